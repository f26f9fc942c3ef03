"""What a checkpoint holds of the model that a task needs, and what of it is therefore new.

transformers makes up at random whatever a checkpoint lacks, and says so to its caller alone. Here
its word is taken: what is missing *is* the task head. It starts from the run's seed, trains,
travels and is exported; nothing random stays in a base that everybody must share.
"""

# pyright: standard
# transformers is typed in part.
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedft.core.errors import EnvironmentFailure, FedftError, MismatchError, SecurityRefusal
from fedft.core.spec import ModelSpec
from fedft.core.tasks import task_of
from fedft.core.types import block_of

HEADS = ("classifier", "score")
"""Top-level modules that are a task head, whatever a checkpoint has under these names: its classes
were others. peft's own list for classification."""


def auto_class(task: str) -> Any:
    """The class of transformers that loads a task's model."""
    import transformers

    return getattr(transformers, task_of(task).auto)


@dataclass(frozen=True)
class Head:
    """What of a model is new, and therefore trained and carried whole.

    Attributes:
        parameters: names of its tensors, in the order of the model.
        modules: the largest modules that hold nothing else, in the order of the model: what peft
            calls ``modules_to_save``.
        outputs: those of ``modules`` that give the logits.
        beside: names of frozen tensors that peft takes for the head's, since it goes by how a path
            ends: an adapter's file must hold them, too, as the base has them.
    """

    parameters: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @staticmethod
    def of(model: nn.Module, parameters: Collection[str], outputs: Iterable[str] = HEADS) -> "Head":
        """The head that these parameters of a model are.

        Args:
            model: only names are read.
            parameters: names of what is new.
            outputs: modules that give the logits, and whatever lies in them.
        """
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]  # tied ones
        new = frozenset(parameters)
        modules = tuple(_largest(model, names, new))
        tops = tuple(outputs)
        last = tuple(m for m in modules if any(_within(t, m) or _within(m, t) for t in tops))
        ends = (*modules, *HEADS) if modules else ()
        taken = [path for path, _ in model.named_modules() if path.endswith(ends) and ends]
        beside = [n for n in names if n not in new and any(_within(n, path) for path in taken)]
        return Head(tuple(name for name in names if name in new), modules, last, tuple(beside))

    @staticmethod
    def by_name(model: nn.Module) -> "Head":
        """The head of a model that no checkpoint stands behind: :data:`HEADS`."""
        names = [name for name, _ in model.named_parameters()]
        return Head.of(model, [name for name in names if name.split(".")[0] in HEADS])

    def holds(self, path: str) -> bool:
        """Whether a module, or a parameter, is the head's."""
        return any(_within(path, module) for module in self.modules)


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _largest(model: nn.Module, names: Iterable[str], new: Collection[str]) -> Iterator[str]:
    """Modules all of whose parameters are new, and whose parent's are not."""
    foreign = {p for name in names if name not in new for p in _parents(name)}
    found: set[str] = set()
    for path, module in model.named_modules():
        bare = next(module.parameters(), None) is None
        if not path or path in foreign or bare:
            continue
        if not any(_within(path, larger) for larger in found):
            found.add(path)
            yield path


def _parents(name: str) -> Iterator[str]:
    """Of ``a.b.weight``: ``a.b`` and ``a``."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


# ------------------------------------------------------------------- what the loader reports


@dataclass(frozen=True)
class Report:
    """What transformers says of a checkpoint, loaded as the model of a task.

    Attributes:
        missing: names that the model has and the checkpoint has not.
        mismatched: name → (shape in the checkpoint, shape in the model).
    """

    missing: frozenset[str]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


def head_of(spec: ModelSpec, folder: Path, classes: int) -> Head:
    """The task head of a checkpoint; no weight is read into memory.

    Args:
        spec: which model, for which task.
        folder: of the checkpoint.
        classes: number of classes; ignored for a causal language model.

    Raises:
        MismatchError: transformers has no model of this kind for the task, cannot read the
            checkpoint, or finds a part of the network itself missing or of another shape.
    """
    return _head_of(spec.model_dump_json(), folder, stamp(folder), classes)


def stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """By which a checkpoint that changed in its place is known without reading it."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors*"))]
    return tuple((str(p), s.st_size, s.st_mtime_ns) for p in files if (s := p.stat()))


@lru_cache(maxsize=8)
def _head_of(spec_json: str, folder: Path, _: object, classes: int) -> Head:
    spec = ModelSpec.model_validate_json(spec_json)
    model, report = _reported(spec, folder, classes)
    if not task_of(spec.task).head:
        _refuse_lacking(spec, folder, model, report.missing)
        _refuse_mismatched(folder, report.mismatched)
        return Head()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with torch.device("meta"):
        wider = {n: tuple(p.shape) for n, p in empty(spec, folder, classes + 1).named_parameters()}
    outputs = {name for name, shape in shapes.items() if wider.get(name) != shape}
    named = {name for name in shapes if name.split(".")[0] in HEADS}
    new = (report.missing & shapes.keys()) | outputs | named
    _refuse_lacking(spec, folder, model, report.missing - outputs - named)
    others = {n: s for n, s in report.mismatched.items() if n not in outputs | named}
    _refuse_mismatched(folder, others)
    tops = {name.rpartition(".")[0] for name in outputs} | {*HEADS}
    return Head.of(model, new, tops)


def _reported(spec: ModelSpec, folder: Path, classes: int) -> tuple[nn.Module, Report]:
    options = task_of(spec.task).options(classes)
    with refusing(spec, folder):
        model, info = auto_class(spec.task).from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            **options,
        )
    before = set(model.state_dict())
    task_of(spec.task).settle(model, spec.embedding, folder)
    unused = before - set(model.state_dict())
    mismatched = {
        name: (tuple(held), tuple(wanted)) for name, held, wanted in info["mismatched_keys"]
    }
    return model, Report(frozenset(info["missing_keys"]) - unused, mismatched)


def empty(spec: ModelSpec, folder: Path, classes: int) -> nn.Module:
    """The task's model with weights of its own making, on the default device.

    Raises:
        MismatchError: transformers has no model of this kind for the task.
    """
    import transformers

    options = task_of(spec.task).options(classes)
    auto = auto_class(spec.task)
    with refusing(spec, folder):
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=spec.trust_remote_code, **options
        )
        model = auto.from_config(config, trust_remote_code=spec.trust_remote_code)
    task_of(spec.task).settle(model, spec.embedding, folder)
    return model


@contextmanager
def refusing(spec: ModelSpec, folder: Path) -> Iterator[None]:
    """What transformers raises about a checkpoint, in one sentence.

    Raises:
        EnvironmentFailure: a package is missing.
        MismatchError: anything else but an error of ours was raised inside.
    """
    try:
        yield
    except FedftError:
        raise
    except ImportError as error:
        raise EnvironmentFailure(
            f"[model] source = {spec.source!r} needs a package that is not installed: "
            f"{first_sentence(error)}",
            fix="Install it in the environment of every machine that trains.",
        ) from error
    except Exception as error:  # transformers, safetensors and tokenizers raise many types
        if lacks_memory(error):
            raise MismatchError(
                f"there is not enough memory to load {spec.source!r} ({first_sentence(error)})",
                fix='Choose a smaller model, [engine] precision = "bf16", or fewer workers.',
            ) from error
        kind = _model_type(folder)
        if not _known(kind):
            from transformers import __version__

            raise MismatchError(
                f"{folder / 'config.json'} says model_type = {kind!r}, which transformers {__version__} "
                "does not know",
                fix="Upgrade transformers, or choose a model that it knows.",
            ) from error
        if "nrecognized configuration class" in str(error):
            raise MismatchError(
                f"transformers has no {kind} model for [model] task = {spec.task!r}",
                fix="Choose another task, or a model of another kind.",
            ) from error
        raise MismatchError(
            f"transformers cannot load the {kind} model in {folder} for [model] task = "
            f"{spec.task!r}: {first_sentence(error)}",
            fix="Check that the folder is a complete checkpoint of a supported kind.",
        ) from error


@contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """What transformers raises about a tokenizer or an image processor, in one sentence.

    Args:
        folder: of the model.
        what: is read.

    Raises:
        SecurityRefusal: it would run code that came with the model.
        EnvironmentFailure: a package is missing.
        MismatchError: anything else but an error of ours was raised inside.
    """
    try:
        yield
    except FedftError:
        raise
    except ImportError as error:
        raise EnvironmentFailure(
            f"the {what} in {folder} needs a package that is not installed: {first_sentence(error)}",
            fix="Install it in the environment of every machine that trains.",
        ) from error
    except BaseException as error:  # tokenizers panics in Rust, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        if "trust_remote_code" in str(error):
            raise SecurityRefusal(
                f"the {what} in {folder} wants to run code of its own",
                fix="Use a model whose files need none.",
            ) from error
        raise MismatchError(
            f"transformers cannot read the {what} in {folder}: {first_sentence(error)}",
            fix="Put the files of that model there, all of them, as save_pretrained writes them.",
        ) from error


def check_tokenizer(tokenizer: Any, folder: Path, task: str) -> None:
    """Try a tokenizer: does it have words, and does its chat template, if asked for, give a text?

    Args:
        tokenizer: of transformers.
        folder: it comes from.
        task: as in :class:`~fedft.core.spec.ModelSpec`.

    Raises:
        MismatchError: transformers made it up, since the folder has none; or its template raises,
            is none, or is several of which none is the default.
    """
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise MismatchError(
            f"{folder} has no tokenizer: transformers makes one up that knows no word",
            fix="Put the tokenizer's files beside the model, all of them.",
        )
    template = getattr(tokenizer, "chat_template", None)
    if not task_of(task).words or template is None:
        return
    if isinstance(template, dict) and "default" not in template:
        raise MismatchError(
            f"the tokenizer in {folder} has chat templates named {', '.join(sorted(template)) or 'nothing'}, "
            "and none is the default",
            fix="Save the one that you want as chat_template.jinja in a copy of the model.",
        )
    asked = {"role": "user", "content": "a"}
    told = {"role": "assistant", "content": "b"}
    try:
        tokenizer.apply_chat_template([asked], add_generation_prompt=True, tokenize=False)
        tokenizer.apply_chat_template([asked, told], tokenize=False)
    except Exception as error:  # whatever jinja and the template itself raise
        raise MismatchError(
            f"the chat template of the tokenizer in {folder} cannot be used: {type(error).__name__}: "
            f"{first_sentence(error)}",
            fix="Mend chat_template.jinja in a copy of the model, or take it out: prompts and answers then "
            "follow each other as plain text.",
        ) from error


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that memory ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "alloc" in str(error)
    )


def first_sentence(error: BaseException) -> str:
    """The first line of what another library says, with its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"


def _known(kind: str) -> bool:
    from transformers import CONFIG_MAPPING

    return kind in CONFIG_MAPPING


def _model_type(folder: Path) -> str:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        found = None
    return str(found or "unknown")


def _refuse_lacking(
    spec: ModelSpec, folder: Path, model: nn.Module, missing: Collection[str]
) -> None:
    """Refuse a checkpoint that lacks more than a head: a block, an embedding, half of a layer."""
    embedded = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        for name, _ in module.named_parameters(recurse=False)
    }
    heads = Head.of(model, missing)
    parameters = {name for name, _ in model.named_parameters()}
    lost = sorted(
        name
        for name in missing
        if name.rpartition(".")[2] not in ("position_ids", "num_batches_tracked")
        and (
            not task_of(spec.task).head
            or name not in parameters
            or name in embedded
            or block_of(name) is not None
            or not heads.holds(name)
        )
    )
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise MismatchError(
            f"the checkpoint in {folder} lacks {', '.join(lost[:3])}{more}, which {type(model).__name__} "
            "needs and no task head is: transformers would make them up at random",
            fix="Use a complete checkpoint, or one that was made for this task.",
        )


def _refuse_mismatched(
    folder: Path, mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    if mismatched:
        name, (held, wanted) = min(mismatched.items())
        raise MismatchError(
            f"the checkpoint in {folder} has {name} as {list(held)}, and its config.json says "
            f"{list(wanted)}",
            fix="Put the config.json back that belongs to these weights.",
        )
