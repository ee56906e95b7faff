"""What the text tower costs: every row against distinct captions, the whole vocabulary against the pruned one.

    python benchmarks/text.py --root NABIRDS

NABIRDS holds `classes.txt` and `image_class_labels.txt` of the release. The network is DistilBERT from its default
config, untrained; its captions are the paper's sentence, a word a token, as no vocabulary is at hand offline.
CPU time on one thread, the smallest of interleaved repetitions. The peer, every row, is what open_clip and the
authors' notebook do.
"""

import copy
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, DistilBertConfig

from xcon import captions
from xcon.encoders import TextEncoder, TextSpec

STEP_ROWS = 32  # of a whole step with its optimiser: the paper's batch


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure."""

    root: Path
    """Folder with the class names and labels of NABirds."""
    rows: tuple[int, ...] = (32, 256, 1024)
    """Batch sizes."""
    repeats: int = 3
    """Times that each is measured."""


def main() -> None:
    """Runs both comparisons."""
    settings = tyro.cli(Settings)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = dict(line.split(" ", 1) for line in lines(settings.root / "classes.txt"))
    raw = [line.split()[1] for line in lines(settings.root / "image_class_labels.txt")]  # of every photograph
    sorted_ids = {label: i for i, label in enumerate(sorted(set(raw)))}
    sentences = [f"This is a photograph of {names[label]}" for label in sorted_ids]
    tokenizer = captions.build_tokenizer(sentences)
    tokens = captions.tokenise(tokenizer, sentences)  # [C, L]
    labels = torch.tensor([sorted_ids[label] for label in raw])

    config = DistilBertConfig()
    pad = captions.pad_id(tokenizer)
    whole = TextEncoder(TextSpec(config.to_dict(), pad, "cls"), AutoModel.from_config(config))
    pruned = copy.deepcopy(whole)
    pruned.prune(tokens)

    console = Console()
    console.print(f"{len(tokens)} captions of {tokens.shape[1]} tokens at most")
    table = Table("rows", "captions", "every row, s", "distinct, s", "ratio")
    for rows in settings.rows:
        batch = labels[torch.randint(len(labels), (rows,))]  # [B]
        forms = (tokens[batch], tokens[batch.unique()])  # [B, L], [n, L]
        every, once = alternate(settings.repeats, *(partial(forward_backward, whole, form) for form in forms))
        table.add_row(str(rows), str(len(forms[1])), f"{every:.2f}", f"{once:.2f}", f"{every / once:.2f}")
    console.print(table)

    distinct = tokens[labels[torch.randint(len(labels), (STEP_ROWS,))].unique()]
    steps = [step_of(encoder, distinct) for encoder in (whole, pruned)]
    times = alternate(3 * settings.repeats, *steps)
    table = Table("vocabulary", "rows", "million parameters", f"step of {len(distinct)} captions, s", "ratio")
    for name, encoder, seconds in zip(("whole", "pruned"), (whole, pruned), times, strict=True):
        size = sum(p.numel() for p in encoder.parameters()) / 1e6
        kept = config.vocab_size if encoder.kept is None else len(encoder.kept)
        table.add_row(name, str(kept), f"{size:.1f}", f"{seconds:.3f}", f"{times[0] / seconds:.2f}")
    console.print(table)


def lines(path: Path) -> list[str]:
    """The lines of a text file, of one space between words."""
    return [" ".join(line.split()) for line in path.read_text(encoding="utf-8").splitlines()]


def forward_backward(encoder: TextEncoder, tokens: Tensor) -> None:
    """Encodes each row of tokens, equal ones too: the network itself, not the encoder that finds them."""
    mask = tokens != encoder.spec.pad_id
    encoder.network(input_ids=tokens, attention_mask=mask.long()).last_hidden_state[:, 0].square().sum().backward()
    encoder.zero_grad()


def step_of(encoder: TextEncoder, tokens: Tensor) -> Callable[[], None]:
    """A training step with AdamW."""
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-5, weight_decay=0.0, fused=True)

    def step() -> None:
        encoder(tokens).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def alternate(repeats: int, *bodies: Callable[[], None]) -> list[float]:
    """The smallest CPU seconds of each, measured in turns after one turn to warm up."""
    best = [float("inf")] * len(bodies)
    for turn in range(repeats + 1):
        for i, body in enumerate(bodies):
            before = time.process_time()
            body()
            if turn > 0:
                best[i] = min(best[i], time.process_time() - before)
    return best


if __name__ == "__main__":
    main()
