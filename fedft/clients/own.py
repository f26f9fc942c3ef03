"""How a client's file is read: in its owner's words, never in a server's."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedft.core.errors import ConfigError
from fedft.core.spec import DataSpec, PartitionSpec, TaskSpec
from fedft.core.tasks import task_of

_DEFAULT = DataSpec()


@dataclass(frozen=True)
class Own:
    """What ``fedft join`` says about its file.

    Attributes:
        text, label, prompt, answer, image: names of columns, each with a default that is its own name.
        relabel: the file's label → its name in the run.
        most_rows: of the file, the first ones; None takes all.
        skip_bad: leave malformed rows out, instead of stopping at the first.
        columns: names of the columns of other tasks, by what the task calls them.
        format: of the rows; ``auto`` goes by the columns, whatever the server's rows are.
    """

    text: str = _DEFAULT.text
    label: str = _DEFAULT.label
    prompt: str = _DEFAULT.prompt
    answer: str = _DEFAULT.answer
    image: str = _DEFAULT.image
    relabel: Mapping[str, str] = field(default_factory=dict[str, str])
    most_rows: int | None = None
    skip_bad: bool = False
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    format: str = _DEFAULT.format

    def __post_init__(self) -> None:
        if self.most_rows is not None and self.most_rows < 1:
            raise ConfigError(
                f"--max-rows {self.most_rows} is no number of rows: it counts from 1",
                fix="Leave it away to take all.",
            )

    def data(self, given: DataSpec, source: str) -> DataSpec:
        """The table to read the file by. Of the server's it has the length of a row, packing and the hold-out.

        All of the file is the client's to train on.
        """
        return DataSpec(
            source=source,
            text=self.text,
            label=self.label,
            prompt=self.prompt,
            answer=self.answer,
            image=self.image,
            max_length=given.max_length,
            holdout=given.holdout,
            test_fraction=0.0,
            skip_bad=self.skip_bad,
            columns=dict(self.columns),
            format=self.format,
            packing=given.packing,
            partition=PartitionSpec(kind="iid"),
        )

    def suggestion(self, task: TaskSpec) -> str:
        """What the server calls the columns, where that is something else; empty where it is not."""
        mine = self.data(task.data, "")
        keys = [column.key for column in task_of(task.model.task).columns]
        named = {key: task.data.column(key) for key in keys}
        other = {key: value for key, value in named.items() if value != mine.column(key)}
        if not other:
            return ""
        options = " ".join(
            f"--{key} {value[:80]}" if hasattr(self, key) else f"--column {key}={value[:80]}"
            for key, value in other.items()
        )
        return f"the server calls the columns otherwise; if yours are, join with {options}"


def mapping(
    pairs: list[str] | None, option: str = "--map-label", form: str = "OLD=NEW"
) -> dict[str, str]:
    """``--map-label old=new``, any number of times.

    Args:
        pairs: as given.
        option: that they were given to.
        form: of a pair, for messages.

    Raises:
        ConfigError: one is no pair, or a name is mapped twice.
    """
    found: dict[str, str] = {}
    for pair in pairs or []:
        old, sign, new = pair.partition("=")
        if not (sign and old.strip() and new.strip()) or old.strip() in found:
            raise ConfigError(
                f"{option} {pair[:80]} is no {form}, or comes twice",
                fix="Give each label once." if form == "OLD=NEW" else "Give each name once.",
            )
        found[old.strip()] = new.strip()
    return found
