"""Small random models of the families that people train, each with a batch for it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.ranks.worker import PRELOAD

VOCABULARY, WIDTH, LENGTH, SAMPLES = 61, 32, 7, 2

Inputs = dict[str, torch.Tensor]


class NanoGpt(nn.Module):
    """As in nanoGPT: fused qkv, learned positions, a head tied to the embedding."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
            self.c_proj = nn.Linear(WIDTH, WIDTH)
            self.c_fc, self.c_out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = [h.unflatten(-1, (4, -1)).transpose(1, 2) for h in self._qkv(x)]
            y = F.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + self.c_proj(y.transpose(1, 2).flatten(2))
            return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))

        def _qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.c_attn(self.ln_1(x)).split(WIDTH, dim=2)

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(16, WIDTH)
        self.h = nn.ModuleList(self.Block() for _ in range(2))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class ResNet(nn.Module):
    """Convolutions, shortcuts and batch norms (which see all ranks' samples in the oracle only)."""

    class Block(nn.Module):
        def __init__(self, inner: int, outer: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
            self.bn1, self.bn2 = nn.GroupNorm(2, outer), nn.GroupNorm(2, outer)
            self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
            self.downsample = nn.Conv2d(inner, outer, 1, stride, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(y + self.downsample(x))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.Sequential(self.Block(8, 8, 1), self.Block(8, 16, 2))
        self.fc = nn.Linear(16, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layers(F.relu(self.stem(image))).mean((2, 3)))


class Seq2Seq(nn.Module):
    """``nn.Transformer`` between embeddings and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 1, 1, 48, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(self.transformer(x, x.flip(1)))


def _ids(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (SAMPLES, LENGTH), generator=generator)


def _image(seed: int, side: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, 3, side, side, generator=generator, dtype=torch.float64)


#: Name -> (model from the current random state, its keyword arguments from a seed).
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    "nanoGPT": (NanoGpt, lambda seed: {"ids": _ids(seed)}),
    "ResNet": (ResNet, lambda seed: {"image": _image(seed)}),
    "nn.Transformer": (Seq2Seq, lambda seed: {"ids": _ids(seed)}),
}

#: Those of Hugging Face, by the configuration's class.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2Config", {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 16}),
    "Llama": (
        "LlamaConfig",
        {"hidden_size": WIDTH, "intermediate_size": 48, "num_key_value_heads": 2},
    ),
    "BERT": ("BertConfig", {"hidden_size": WIDTH, "intermediate_size": 48}),
    "ViT": (
        "ViTConfig",
        {"hidden_size": WIDTH, "intermediate_size": 48, "image_size": 16, "patch_size": 4},
    ),
    "T5": (
        "T5Config",
        {"d_model": WIDTH, "d_ff": 48, "d_kv": 8, "num_layers": 2, "decoder_start_token_id": 0},
    ),
    "Mixtral": (
        "MixtralConfig",
        {
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "num_local_experts": 3,
            # What its default wants on a CPU is bf16.
            "experts_implementation": "eager",
        },
    ),
}
_MODELS = {
    "GPT-2": "GPT2LMHeadModel",
    "Llama": "LlamaForCausalLM",
    "BERT": "BertForMaskedLM",
    "ViT": "ViTForImageClassification",
    "T5": "T5ForConditionalGeneration",
    "Mixtral": "MixtralForCausalLM",
}
HAS_TRANSFORMERS = find_spec("transformers") is not None
if HAS_TRANSFORMERS:  # once for all ranks, of which each would import it for seconds
    PRELOAD.append("transformers.models.gpt2.modeling_gpt2")

#: Those of timm, by its own names.
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
}
HAS_TIMM = find_spec("timm") is not None and find_spec("torchvision") is not None


def build(name: str) -> nn.Module:
    """A model of a family, in training mode without dropout."""
    if name in FAMILIES:
        return FAMILIES[name][0]()
    if name in TIMM:
        import timm

        vision: nn.Module = timm.create_model(name, num_classes=5, **TIMM[name])
        return vision
    import transformers

    config_class, options = CONFIGS[name]
    config = getattr(transformers, config_class)(
        **{
            "vocab_size": VOCABULARY,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "pad_token_id": 0,
            "use_cache": False,
            **options,
        }
    )
    for option in list(vars(config)):
        if "drop" in option and isinstance(getattr(config, option), float):
            setattr(config, option, 0.0)
    model: nn.Module = getattr(transformers, _MODELS[name])(config)
    return model.train()


def inputs(name: str, seed: int) -> Inputs:
    """Keyword arguments of the forward: two samples."""
    if name in FAMILIES:
        return FAMILIES[name][1](seed)
    if name in TIMM:
        return {"x": _image(seed, 32)}
    if name == "ViT":
        return {"pixel_values": _image(seed)}
    ids = {"input_ids": _ids(seed)}
    return {**ids, "decoder_input_ids": _ids(seed + 5)} if name == "T5" else ids


def loss_of(output: Any) -> torch.Tensor:
    """A mean over samples, in the dtype of the logits (models' own losses are in fp32)."""
    logits = output if isinstance(output, torch.Tensor) else output.logits
    loss: torch.Tensor = (logits - 0.5).square().mean()
    return loss
