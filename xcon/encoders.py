"""The three encoders (paper, section 3.1): image, text, metadata. Each says its output `width` and its `spec`.

A spec is what rebuilds the encoder without its weights, and is saved in a run's `model.json`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.data import resolve_model_data_config  # type: ignore[attr-defined]
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    DistilBertConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from xcon import captions, geotime
from xcon.config import MetaEncoding
from xcon.images import ImageSpec

# Legend: b rows, H and W pixels, L tokens, F width of an encoder.

SMALL_TEXT = "small-distilbert"
COLOURS = 3  # channels of a photograph


# --------------------------------------------------------------------------------------------------------
# Image


class ImageEncoder(nn.Module):
    """Any timm network without its classifier; it normalises pixels itself, on its device.

    Where `spec.places` names an encoding, it takes metadata too: each feature is a channel of the photograph, the
    same number at every pixel (paper, section 4.2, "we appended meta information as an extra channel on input").
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ImageSpec, network: Any = None) -> None:
        super().__init__()
        self.spec = spec
        self.channels = COLOURS + (geotime.width(spec.places) if spec.places else 0)
        options = {**spec.options, "in_chans": self.channels} if spec.places else spec.options
        network = network or _timm_network(spec.backbone, options, pretrained=False)
        self.network = network.to(memory_format=torch.channels_last)
        self.width = int(network.head_hidden_size)  # not num_features: some have a layer after the pooling
        self.register_buffer("mean", 255 * torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(spec.std).view(3, 1, 1), persistent=False)
        self.check_size(spec.size, "--image-size")

    def check_size(self, size: int, setting: str) -> None:
        """Raises ValueError where the network does not take photographs of a size: found out by trying."""
        blank = torch.zeros(1, self.channels, size, size)
        self.network.eval()
        try:
            with torch.no_grad():
                self.network(blank)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"{setting} {size}: {self.spec.backbone} refuses it ({error})") from None
        self.network.train()

    def forward(self, photos: Tensor, places: Tensor | None = None) -> Tensor:
        """Features of photographs.

        Args:
            photos: `[b, 3, H, W]` from 0 to 255, uint8 as a rule.
            places: `[b, 3]` lon, lat in degrees, fraction of the year, where the network takes them; NaN where
                unknown, which is 0 in its channels.

        Returns:
            `[b, F]`.
        """
        pixels = (photos.to(self.mean.dtype) - self.mean) / self.std  # [b, 3, H, W]
        if self.spec.places:
            assert places is not None
            features = geotime.encode(places, self.spec.places).to(pixels.dtype)  # [b, W]
            constant = features[:, :, None, None].expand(-1, -1, *pixels.shape[2:])
            pixels = torch.cat([pixels, constant], dim=1)  # [b, 3 + W, H, W]
        return self.network(pixels.contiguous(memory_format=torch.channels_last))


def build_image(
    backbone: str, options: Mapping[str, str], *, weights: str, size: int, places: MetaEncoding | None = None
) -> ImageEncoder:
    """Builds an image encoder.

    Args:
        backbone: a timm name.
        options: keyword arguments of `timm.create_model`; values are read as JSON where they are JSON.
        weights: `imagenet` (timm's own, from the hub or its cache), `none`, or a safetensors file. Where the
            file's metadata has `mean` and `std`, they are used instead of timm's.
        size: side of the square the network will see.
        places: encoding of the metadata that it takes as channels. Their weights start at zero, so that it starts
            as the network of the photograph alone.

    Raises:
        ValueError: no such network, an option it does not take, or weights that do not fit it.
        FileNotFoundError: no such weights.
    """
    values = read_options(options)
    network = _timm_network(backbone, values, pretrained=weights == "imagenet")
    facts = resolve_model_data_config(network)
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    if weights not in ("imagenet", "none"):
        metadata = _load_weights(network, Path(weights))
        mean, std = (_numbers(metadata.get(k)) or v for k, v in (("mean", mean), ("std", std)))
    spec = ImageSpec(backbone, values, size, mean, std, facts["crop_pct"], facts["interpolation"], places)
    if not places:
        return ImageEncoder(spec, network)
    encoder = ImageEncoder(spec)
    _widen(encoder.network, network.state_dict(), backbone)
    return encoder


def _widen(network: nn.Module, colours: Mapping[str, Tensor], backbone: str) -> None:
    """Loads weights of a network of three channels into one of more: zero for each channel beyond.

    Raises:
        ValueError: the networks differ in more than the channels that a first layer takes.
    """
    state = network.state_dict()
    for name, theirs in colours.items():
        ours = state[name]
        if ours.shape == theirs.shape:
            state[name] = theirs
        elif theirs.ndim > 1 and ours[:, :COLOURS].shape == theirs.shape:
            state[name] = torch.cat([theirs, torch.zeros_like(ours[:, COLOURS:])], dim=1)
        else:
            raise ValueError(f"--image-backbone {backbone}: its {name} takes no further channels")
    network.load_state_dict(state)


def _timm_network(backbone: str, options: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    try:
        return timm.create_model(backbone, pretrained=pretrained, num_classes=0, **options)
    except OSError:
        raise FileNotFoundError(
            f"ImageNet weights of {backbone} are not in the local cache and the hub cannot be reached: "
            f"`xcon prefetch --image-backbone {backbone}` where there is a network, or give --image-weights "
            "FILE.safetensors (or none)"
        ) from None
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"--image-backbone {backbone}: timm refuses it ({error})") from None


def _load_weights(network: nn.Module, file: Path) -> dict[str, str]:
    """Loads weights into a network, all but its classifier's; returns the file's metadata."""
    if not file.is_file():
        raise FileNotFoundError(f"--image-weights {file}: no such file")
    try:
        state = load_file(file)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"--image-weights {file}: not a safetensors file ({error})") from None
    wanted = network.state_dict()
    wrong = [n for n in wanted if n not in state or state[n].shape != wanted[n].shape]
    if wrong:
        problem = "has no" if wrong[0] not in state else "has another shape of"
        raise ValueError(
            f"--image-weights {file}: not weights of this network, it {problem} {wrong[0]} "
            f"({len(wrong)} of {len(wanted)} tensors do not fit)"
        )
    network.load_state_dict({name: state[name] for name in wanted})
    return metadata


def read_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a command line, read as JSON where they are JSON (`true`, `0.1`), else as text."""
    return {name: _json_or_text(text) for name, text in options.items()}


def _json_or_text(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return text


def _numbers(text: str | None) -> tuple[float, ...] | None:
    return tuple(float(word) for word in text.split()) if text else None


# --------------------------------------------------------------------------------------------------------
# Text


@dataclasses.dataclass(frozen=True)
class TextSpec:
    """A Hugging Face config; the tokenizer lies in the run's `tokenizer/` folder.

    Attributes:
        config: of the model, with its `model_type`.
        pad_id: the token that fills up short captions.
        pooling: cls takes the first token's vector, mean the average over the caption.
    """

    config: Mapping[str, Any]
    pad_id: int
    pooling: Literal["cls", "mean"]


class TextEncoder(nn.Module):
    """Any Hugging Face text model; equal captions of a batch are encoded once.

    Dropout is off, so that a caption has one vector per batch whichever process encodes it: only then is the
    loss a function of the global batch and not of how it was dealt out.

    Attributes:
        width: F.
        kept: `[v]` rows of the vocabulary that are left after `prune`; None: all.
        whole: `[V, E]` the token embeddings before that.
    """

    row: Tensor
    kept: Tensor | None = None
    whole: Tensor | None = None

    def __init__(self, spec: TextSpec, network: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.network = network or AutoModel.from_config(AutoConfig.for_model(**spec.config))
        if "pooler" in dict(self.network.named_children()):
            self.network.pooler = None  # unused, and DDP refuses parameters without a gradient
        self.width = int(self.network.config.hidden_size)
        self.network.eval()

    def train(self, mode: bool = True) -> "TextEncoder":
        """Switches this module, not its network: that stays without dropout."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """Vectors of captions.

        Args:
            tokens: `[b, L]` token ids, padded with `spec.pad_id`.

        Returns:
            `[b, F]`.
        """
        distinct, number = tokens.unique(dim=0, return_inverse=True)  # [n, L], [b]
        mask = distinct != self.spec.pad_id  # [n, L]
        mask[:, 0] = True  # never a row without any token
        states = self.network(input_ids=distinct, attention_mask=mask.long()).last_hidden_state  # [n, L, F]
        if self.spec.pooling == "cls":
            pooled = states[:, 0]
        else:
            pooled = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return pooled[number]  # [b, F]

    def encode(self, tokens: Tensor, device: torch.device) -> Tensor:
        """`[K, L]` token ids -> `[K, F]`, without gradient, some at a time on a device."""
        self.to(device)
        with torch.no_grad():
            found = torch.cat([self(part.to(device)).cpu() for part in tokens.split(64)])
        self.to("cpu")
        return found

    def prune(self, tokens: Tensor) -> None:
        """Leaves out the token embeddings that some captions do not use: they have no gradient.

        All else learns the same with less memory, optimiser state and traffic; what is left out keeps its values,
        where weight decay would shrink it. Tokens keep their ids; `restored` gives the whole table.

        Args:
            tokens: `[K, L]` of all captions that will be encoded.
        """
        table = self.network.get_input_embeddings()
        if not isinstance(table, nn.Embedding):
            raise ValueError(f"--text-model: its token embeddings are a {type(table).__name__}, no nn.Embedding")
        self.whole = table.weight.detach().clone()
        self.kept = torch.cat([tokens.flatten(), torch.tensor([self.spec.pad_id])]).unique()  # [v]
        row = torch.full((len(self.whole),), len(self.kept))  # of a token left out: none
        row[self.kept] = torch.arange(len(self.kept))
        self.register_buffer("row", row, persistent=False)
        table.weight, table.num_embeddings = nn.Parameter(self.whole[self.kept]), len(self.kept)
        if table.padding_idx is not None:
            table.padding_idx = int(row[table.padding_idx])
        # A hook, so that a network that looks at the ids for positions, or scales its embeddings, still does.
        table.register_forward_pre_hook(self._number)

    def _number(self, _: nn.Module, tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.row[tokens[0]],)

    def restored(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dictionary with all token embeddings.

        Args:
            state: of this encoder after training; what is missing, as where it was frozen, is taken from itself.
        """
        full = {**self.state_dict(), **state}
        if self.kept is not None and self.whole is not None:
            table = self.network.get_input_embeddings().weight
            for name, parameter in self.named_parameters(remove_duplicate=False):
                if parameter is table:
                    full[name] = self.whole.to(full[name].dtype).index_copy(0, self.kept, full[name].cpu())
        return full


class EncodedText(nn.Module):
    """Stands in for a frozen text encoder: takes the vectors `[b, F]` that it gave."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.spec, self.width = encoder.spec, encoder.width

    def forward(self, vectors: Tensor) -> Tensor:
        """`[b, F]`, as they are."""
        return vectors


def build_text(name: str, texts: Sequence[str]) -> tuple[TextEncoder, PreTrainedTokenizerBase]:
    """Builds a text encoder and its tokenizer.

    Args:
        name: a Hugging Face model by name or folder, or `small-distilbert`: two untrained layers, 256 wide,
            with a vocabulary made from `texts`.
        texts: the captions of the shard set.

    Raises:
        FileNotFoundError: neither a folder with a model nor in the cache nor on the hub.
        ValueError: damaged weights, a tokenizer that cannot pad, or captions too long for the model.
    """
    if name == SMALL_TEXT:
        tokenizer: PreTrainedTokenizerBase = captions.build_tokenizer(texts)
        config = DistilBertConfig(
            vocab_size=len(tokenizer), dim=256, n_layers=2, n_heads=4, hidden_dim=1024,
            max_position_embeddings=64, pad_token_id=captions.pad_id(tokenizer),
        )  # fmt: skip
        network = AutoModel.from_config(config)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            network = AutoModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
        except SafetensorError as error:
            raise ValueError(f"--text-model {name}: its weights are damaged ({error})") from None
        except (OSError, ValueError):  # ValueError: a folder with something else in it
            raise FileNotFoundError(
                f"--text-model {name}: no folder with a model, not in the local cache, and the hub cannot be "
                f"reached or has no such model; `xcon prefetch --text-model {name}` where there is a network, or "
                f"take {SMALL_TEXT}"
            ) from None
    if network.config.is_encoder_decoder:
        raise ValueError(f"--text-model {name}: an encoder with a decoder; an encoder alone is needed")
    longest = int(captions.tokenise(tokenizer, texts).shape[1])
    limit = network.config.to_dict().get("max_position_embeddings", longest)
    if longest > limit:
        raise ValueError(f"the longest caption has {longest} tokens, --text-model {name} takes {limit}")
    pooling: Literal["cls", "mean"] = "cls" if tokenizer.cls_token_id is not None else "mean"
    spec = TextSpec(network.config.to_dict(), captions.pad_id(tokenizer), pooling)
    return TextEncoder(spec, network), tokenizer


@dataclasses.dataclass(frozen=True)
class Text:
    """A text encoder made ready for the captions of a shard set.

    Attributes:
        encoder: itself, of which `restored` gives all that is saved.
        tokenizer: its tokenizer.
        tower: what is trained in its place.
        inputs: `[K, ...]` what the tower takes for each caption: token ids, or vectors of a frozen encoder.
    """

    encoder: TextEncoder
    tokenizer: PreTrainedTokenizerBase
    tower: TextEncoder | EncodedText
    inputs: Tensor


def text_for(name: str, texts: Sequence[str], *, frozen: bool, device: torch.device) -> Text:
    """`build_text`, pruned to the vocabulary of the captions, or frozen and the captions encoded on a device."""
    encoder, tokenizer = build_text(name, texts)
    tokens = captions.tokenise(tokenizer, texts)
    if frozen:
        return Text(encoder, tokenizer, EncodedText(encoder), encoder.encode(tokens, device))
    encoder.prune(tokens)
    return Text(encoder, tokenizer, encoder, tokens)


# --------------------------------------------------------------------------------------------------------
# Metadata


@dataclasses.dataclass(frozen=True)
class MetaSpec:
    """Attributes: width of the layers, number of hidden blocks, the encoding of places, dropout within a block."""

    width: int = 256
    depth: int = 4
    encoding: MetaEncoding = "wrap"
    dropout: float = 0.0


class MetaEncoder(nn.Module):
    """A residual multi-layer perceptron on sine-cosine signals (paper, section 3.1, "Meta Embedding").

    The layers are those of Mac Aodha et al. 2019: one linear layer, then `depth` blocks, with their dropout in the
    geographic prior alone. On spherical harmonics it is a network of sines instead, as in Russwurm et al. 2024,
    without dropout.
    """

    def __init__(self, spec: MetaSpec) -> None:
        super().__init__()
        self.spec = spec
        self.width = spec.width
        self.first: nn.Module
        if spec.encoding == "harmonics":
            self.first = _Sine(geotime.width(spec.encoding), spec.width, frequency=30.0, first=True)
            self.blocks = nn.Sequential(*(_Sine(spec.width, spec.width) for _ in range(spec.depth)))
        else:
            self.first = nn.Sequential(nn.Linear(geotime.width(spec.encoding), spec.width), nn.ReLU())
            self.blocks = nn.Sequential(*(_Residual(spec.width, spec.dropout) for _ in range(spec.depth)))

    def forward(self, places: Tensor) -> Tensor:
        """Vectors of places and dates.

        Args:
            places: `[b, 3]` lon, lat in degrees, fraction of the year; NaN where unknown.

        Returns:
            `[b, F]`; rows without any metadata are finite and mean nothing (`geotime.known`).
        """
        dtype = next(self.parameters()).dtype
        features = geotime.encode(places, self.spec.encoding)  # degrees need all their digits, so before `dtype`
        return self.blocks(self.first(features.to(dtype)))


Encoder = ImageEncoder | TextEncoder | EncodedText | MetaEncoder


class _Residual(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        # ReLU and dropout as one, so that the linear layers have the same names in every saved model.
        hidden = nn.Sequential(nn.ReLU(), nn.Dropout(dropout))
        self.layers = nn.Sequential(nn.Linear(width, width), hidden, nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class _Sine(nn.Module):
    """sin(frequency * linear(x)), with the initial weights of Sitzmann et al. 2020, section 3.2."""

    def __init__(self, inputs: int, outputs: int, *, frequency: float = 1.0, first: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.frequency = frequency
        bound = 1 / inputs if first else math.sqrt(6 / inputs) / frequency
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return (self.frequency * self.linear(x)).sin()
