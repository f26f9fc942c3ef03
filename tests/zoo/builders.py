"""Tiny models of many architectures, with random weights, as transformers writes checkpoints.

A checkpoint is what its owner would have saved: for classification the bare network, or one that
was pretrained on masked words, so that what a task needs beyond it is missing; for a causal
language model the whole. Matrices are drawn wide enough for what the network gives to depend on its input.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "fish",
    "red",
    "blue",
    "green",
    "big",
    "small",
    "runs",
    "eats",
    "sleeps",
    "likes",
    "hates",
    "good",
    "bad",
    "house",
    "tree",
    "river",
    "stone",
    "sun",
    "moon",
    "day",
    "night",
    "under",
    "over",
    "near",
    "far",
]
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
VOCABULARY = 384
POSITIONS = 66
SIDE = 32
"""Height and width of an image."""

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN: dict[str, Any] = {
    **TEXT,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": POSITIONS,
}
GROUPED: dict[str, Any] = {**PLAIN, "num_key_value_heads": 1, "head_dim": 16}
SEQ2SEQ: dict[str, Any] = {
    **TEXT,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": POSITIONS,
    "decoder_start_token_id": 2,
}
T5: dict[str, Any] = {
    **TEXT,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
PATCHES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIDE,
    "patch_size": 8,
}
STAGES: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "hidden_sizes": [16, 32],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}


@dataclass(frozen=True)
class Kind:
    """One architecture for one task.

    Attributes:
        name: of the architecture, as transformers has it (``model_type``), and a variant of it.
        task: as ``[model] task``.
        family: under which heading people look for it.
        saved: head that the checkpoint was pretrained with: the ``…`` of ``AutoModelFor…``; empty
            for none.
        sizes: of its configuration.
    """

    name: str
    task: str
    family: str
    saved: str = ""
    sizes: dict[str, Any] = field(default_factory=dict[str, Any], hash=False)

    @property
    def type(self) -> str:
        """transformers' ``model_type``."""
        return self.name.partition(" ")[0]

    def __str__(self) -> str:
        return f"{self.name}-{self.task}".replace(" ", "-")


def _kinds(
    family: str, task: str, saved: str, sizes: dict[str, Any], **names: dict[str, Any]
) -> list[Kind]:
    return [
        Kind(name.replace("__", " ").replace("_dash_", "-"), task, family, saved, {**sizes, **own})
        for name, own in names.items()
    ]


ENCODERS = [
    *_kinds(
        "encoder",
        "classification",
        "MaskedLM",
        PLAIN,
        bert={},
        roberta={},
        albert={"embedding_size": 16},
        electra={"embedding_size": 16},
        mpnet={},
        camembert={},
        deberta={"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        big_bird={"attention_type": "original_full"},
        longformer={"attention_window": [8, 8]},
        nystromformer={"segment_means_seq_len": 64, "num_landmarks": 64},
        esm={"mask_token_id": 4, "position_embedding_type": "rotary"},
        layoutlm={"max_2d_position_embeddings": 32},
        modernbert={
            "local_attention": 8,
            "global_attn_every_n_layers": 2,
            "classifier_pooling": "mean",
        },
        rembert={"input_embedding_size": 16, "output_embedding_size": 16},
        roformer={},
        convbert={"embedding_size": 32, "conv_kernel_size": 3, "head_ratio": 1},
        fnet={},
        ernie={},
        squeezebert={"embedding_size": 32, "q_groups": 1, "k_groups": 1, "v_groups": 1},
        ibert={},
        xmod={"languages": ["en_XX"], "default_language": "en_XX"},
        mobilebert={
            "embedding_size": 32,
            "true_hidden_size": 32,
            "intra_bottleneck_size": 32,
            "num_feedforward_networks": 1,
        },
    ),
    Kind(
        "deberta-v2",
        "classification",
        "encoder",
        "MaskedLM",
        {**PLAIN, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    ),
    Kind("xlm-roberta", "classification", "encoder", "MaskedLM", PLAIN),
    Kind("bert with a pooler", "classification", "encoder", "", PLAIN),
    Kind(
        "distilbert",
        "classification",
        "encoder",
        "MaskedLM",
        {**TEXT, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    ),
    Kind(
        "funnel",
        "classification",
        "encoder",
        "MaskedLM",
        {**TEXT, "block_sizes": [1, 1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64},
    ),
    Kind(
        "xlnet",
        "classification",
        "encoder",
        "CausalLM",
        {**TEXT, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
    ),
]

SEQ2SEQS = [
    *_kinds(
        "encoder-decoder",
        "classification",
        "Seq2SeqLM",
        SEQ2SEQ,
        bart={},
        mbart={},
        mvp={},
        plbart={},
        bigbird_pegasus={"attention_type": "original_full"},
    ),
    *_kinds("encoder-decoder", "classification", "Seq2SeqLM", T5, t5={}, mt5={}, umt5={}),
    Kind(
        "led",
        "classification",
        "encoder-decoder",
        "Seq2SeqLM",
        {**SEQ2SEQ, "max_encoder_position_embeddings": POSITIONS, "attention_window": [8, 8]},
    ),
    *_kinds("encoder-decoder", "causal-lm", "Seq2SeqLM", SEQ2SEQ, bart={}, mbart={}),
    *_kinds("encoder-decoder", "causal-lm", "Seq2SeqLM", T5, t5={}),
]

GPT2: dict[str, Any] = {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 8},
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "gemma2": {**GROUPED, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0},
    "gemma3_text": {**GROUPED, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gpt_neox": PLAIN,
    "gptj": {**GPT2, "rotary_dim": 8},
    "gpt_neo": {
        **TEXT,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": POSITIONS,
    },
    "gpt_bigcode": GPT2,
    "opt": {
        **TEXT,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": POSITIONS,
    },
    "bloom": {**TEXT, "hidden_size": 32, "n_layer": 2, "n_head": 2},
    "falcon": {**PLAIN, "new_decoder_architecture": False, "multi_query": True},
    "mpt": {**TEXT, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": POSITIONS},
    "phi": PLAIN,
    "phi3": {**PLAIN, "num_key_value_heads": 2},
    "stablelm": {**PLAIN, "num_key_value_heads": 2},
    "starcoder2": {**PLAIN, "num_key_value_heads": 1},
    "olmo2": {**PLAIN, "num_key_value_heads": 2},
    "granite": {**PLAIN, "num_key_value_heads": 2, "logits_scaling": 8.0},
    "smollm3": {**GROUPED},
    "mixtral": {**GROUPED, **EXPERTS},
    "qwen3_moe": {
        **GROUPED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "gpt_oss": {**GROUPED, **EXPERTS, "sliding_window": 8},
    "phimoe": {**GROUPED, **EXPERTS},
    "deepseek_v3": {
        **PLAIN,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
}
_LANGUAGE_ONLY: dict[str, dict[str, Any]] = {
    "cohere": {**PLAIN, "num_key_value_heads": 2},
    "granitemoe": {**PLAIN, "num_key_value_heads": 2, **EXPERTS},
    "olmoe": {**PLAIN, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
    "codegen": {**GPT2, "rotary_dim": 8, "n_head": 4},
    "mamba": {**TEXT, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {
        **TEXT,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "rwkv": {
        **TEXT,
        "hidden_size": 32,
        "attention_hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "context_length": POSITIONS,
    },
    "recurrent_gemma": {
        **PLAIN,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "lru_width": 32,
        "attention_window_size": 8,
    },
    "lfm2": {**PLAIN, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]},
    "bert": {**PLAIN},  # made for masked words
    "roberta": {**PLAIN},
}
DECODERS = [
    *(
        Kind(n, task, "decoder", "CausalLM", sizes)
        for n, sizes in _DECODERS.items()
        for task in ("causal-lm",)
    ),
    *(Kind(n, "causal-lm", "decoder", "CausalLM", sizes) for n, sizes in _LANGUAGE_ONLY.items()),
    *(
        Kind(n, "classification", "decoder", "CausalLM", _DECODERS[n])
        for n in ("gpt2", "llama", "qwen2", "gemma2", "falcon", "mixtral", "phi3", "opt")
    ),
    Kind(
        "llama with tied words",
        "causal-lm",
        "decoder",
        "CausalLM",
        {**GROUPED, "tie_word_embeddings": True},
    ),
]

VISION = [
    Kind(name, "image-classification", "vision", saved, sizes)
    for name, saved, sizes in [
        ("vit", "", PATCHES),
        ("deit", "", PATCHES),
        ("beit", "", PATCHES),
        ("data2vec-vision", "", PATCHES),
        ("vit_msn", "", PATCHES),
        ("ijepa", "", PATCHES),
        ("dinov2", "", PATCHES),
        ("dinov2_with_registers", "", PATCHES),
        ("dinov3_vit", "", PATCHES),
        (
            "swin",
            "",
            {
                "image_size": SIDE,
                "patch_size": 4,
                "embed_dim": 16,
                "depths": [1, 1],
                "num_heads": [2, 2],
                "window_size": 4,
            },
        ),
        (
            "swinv2",
            "",
            {
                "image_size": SIDE,
                "patch_size": 4,
                "embed_dim": 16,
                "depths": [1, 1],
                "num_heads": [2, 2],
                "window_size": 4,
            },
        ),
        (
            "convnext",
            "",
            {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "image_size": SIDE},
        ),
        (
            "convnextv2",
            "",
            {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "image_size": SIDE},
        ),
        (
            "resnet",
            "",
            {
                "embedding_size": 16,
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
                "layer_type": "basic",
            },
        ),
        (
            "regnet",
            "",
            {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8},
        ),
        ("mobilenet_v1", "", {"image_size": SIDE, "depth_multiplier": 0.25}),
        ("mobilenet_v2", "", {"image_size": SIDE, "depth_multiplier": 0.35}),
        (
            "efficientnet",
            "",
            {
                "image_size": SIDE,
                "width_coefficient": 0.2,
                "depth_coefficient": 0.1,
                "hidden_dim": 64,
            },
        ),
        (
            "poolformer",
            "",
            {
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
                "patch_sizes": [7, 3],
                "strides": [4, 2],
                "padding": [2, 1],
                "num_encoder_blocks": 2,
            },
        ),
        (
            "segformer",
            "",
            {
                **STAGES,
                "sr_ratios": [2, 1],
                "patch_sizes": [3, 3],
                "strides": [2, 2],
                "decoder_hidden_size": 32,
            },
        ),
        (
            "pvt",
            "",
            {
                **STAGES,
                "image_size": SIDE,
                "sequence_reduction_ratios": [2, 1],
                "patch_sizes": [4, 2],
                "strides": [4, 2],
            },
        ),
        ("clip", "", {"projection_dim": 16, "text_config": PLAIN, "vision_config": PATCHES}),
        ("siglip", "", {"text_config": PLAIN, "vision_config": PATCHES}),
    ]
]

KINDS = [*ENCODERS, *SEQ2SEQS, *DECODERS, *VISION]


def build(kind: Kind, folder: Path) -> Path:
    """The checkpoint of a kind, with tokenizer or image processor, in a folder."""
    import transformers

    auto: Any = getattr(transformers, f"AutoModelFor{kind.saved}" if kind.saved else "AutoModel")
    config = transformers.AutoConfig.for_model(kind.type, **kind.sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config).float()
        widen(model)
        model.save_pretrained(folder)
    if kind.task == "image-classification":
        processor: Any = transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE})
        processor.save_pretrained(folder)
    else:
        tokenizer(ends=kind.family == "encoder-decoder").save_pretrained(folder)
    return folder


def widen(model: torch.nn.Module) -> None:
    """Matrices of the usual initialisation at the scale 1/√d_in: what goes in shows at the end."""
    for parameter in model.parameters():
        if parameter.ndim < 2 or parameter.numel() < 2:
            continue
        spread = float(parameter.detach().std())
        if spread > 0:
            parameter.data.mul_(max(1.0, parameter[0].numel() ** -0.5 / spread))


def tokenizer(ends: bool = False) -> Any:
    """Bytes and whole words, so that whatever class transformers takes for it gives the same.

    Args:
        ends: whether ``</s>`` comes after a text, as an encoder-decoder needs it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        special_tokens=[*SPECIAL],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    if ends:
        bpe.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def write_data(folder: Path) -> dict[str, Path]:
    """Rows of uneven length for every task: ``[model] task`` → ``[data] source``."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    labelled = [{"text": text(2, 14), "label": "abc"[i % 3]} for i in range(64)]
    asked = [{"prompt": text(1, 6), "answer": text(1, 8)} for _ in range(64)]
    for name, rows in (("labelled", labelled), ("asked", asked)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    _draw(folder / "images")
    return {
        "classification": folder / "labelled.jsonl",
        "causal-lm": folder / "asked.jsonl",
        "image-classification": folder / "images",
    }


def _draw(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in "abc":
        (folder / label).mkdir(parents=True)
        for i in range(16):
            pixels = (rng.random((SIDE, SIDE, 3)) * 255).astype("uint8")
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
