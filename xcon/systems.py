"""The systems of the paper's table (section 4.3) and what they are compared with, as recipes and settings.

`xcon.reproduce` runs them. Of size `paper` each is a recipe of its own, at the size that the paper gives it; of
size `laptop` all take the same network and rates, and differ in their method alone.
"""

import dataclasses

from xcon.recipes import FINETUNE


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """One row of the table.

    Attributes:
        title: in the table.
        paper: top-1 in the paper's table, per cent; None: not in it.
        pretrain: recipe and settings of `xcon pretrain`; none: there is no pre-training.
        finetune: recipe and settings of `xcon finetune`.
        prior: recipe and settings of `xcon prior`, which multiplies the scores of the system `of`.
        predict: settings of `xcon predict`, for another evaluation of the system `of`.
        of: another system, whose scores or weights this one takes.
        shares: the system whose pre-training this one starts from, where that is not its own.
        views: of each photograph in an epoch of pre-training.
        reads: whether pre-training has a text tower.
    """

    title: str
    paper: float | None = None
    pretrain: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()
    prior: tuple[str, ...] = ()
    predict: tuple[str, ...] = ()
    of: str | None = None
    shares: str | None = None
    views: int = 1
    reads: bool = True

    def epochs(self, passes: int | None, share: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Epochs of pre-training and of fine-tuning, as settings, that add up to a number of passes.

        A pass sees each photograph once; an epoch on two views is two passes.

        Args:
            passes: over the training photographs; None: as the recipes have it.
            share: of them for pre-training.

        Raises:
            ValueError: too few are left for fine-tuning.
        """
        if passes is None or not self.finetune:
            return (), ()
        before = max(1, round(share * passes / self.views)) if self.pretrain else 0
        after = passes - before * self.views
        fewest = 1 + FINETUNE[self.finetune[0]][1].late_epochs
        if after < fewest:
            raise ValueError(
                f"--budget {passes}: too few for {self.title!r}: pre-training takes {before * self.views}, and "
                f"fine-tuning needs {fewest}"
            )
        return ("--epochs", str(before)), ("--epochs", str(after))


_META = ("--modalities", "image", "meta")
_MOVED = ("--meta-jitter-km", "100", "--meta-jitter-days", "10", "--meta-dropout", "0.1")
_ALONE = ("--meta-encoding", "xyz", "--warmup-epochs", "1")  # what else pre-training would have settled
_GEOPRIOR = System(title="Geo prior x Inception", paper=81.50, prior=("geoprior",), of="inception")
_SOFTMAX = System(title="place-and-date softmax x Inception", prior=("softmax",), of="inception")
_DOUBTING = System(title="Ours, two experts, places doubted", predict=("--doubt", "0.4"), of="best")

SYSTEMS: dict[str, dict[str, System]] = {
    "paper": {
        "inception": System(title="Inception V3", paper=76.61, finetune=("inception",)),
        "inception-meta": System(title="Inception V3 + meta channels", paper=77.56, finetune=("inception-meta",)),
        "supcon": System(
            title="Inception V3 + contrastive learning", paper=79.84, pretrain=("supcon",), views=2, reads=False,
            finetune=("image", "--image-size", "299"),
        ),
        "clip": System(title="CLIP (ResNet-50)", paper=81.66, pretrain=("clip",), finetune=("image",)),
        "geoprior": _GEOPRIOR,
        "softmax": _SOFTMAX,
        "experts": System(title="Ours, two experts, no pre-training", finetune=("best", *_ALONE)),
        "paper": System(title="Ours, as in the paper", paper=84.44, pretrain=("paper",), finetune=("paper",)),
        "doubting": _DOUBTING,
        "best": System(title="Ours, two experts", pretrain=("best",), finetune=("best",)),
    },
    "laptop": {
        "inception": System(title="image only", paper=76.61, finetune=("laptop-image",)),
        "inception-meta": System(
            title="+ meta channels", paper=77.56,
            finetune=("laptop-image", *_META, "--fusion", "channels", *_MOVED),
        ),
        "supcon": System(
            title="+ contrastive learning", paper=79.84, views=2, reads=False, finetune=("laptop-image",),
            pretrain=(
                *("laptop", "--modalities", "image", "--views", "2"),
                *("--temperature", "0.1", "--no-learn-temperature"),
            ),
        ),
        "clip": System(
            title="CLIP", paper=81.66, finetune=("laptop-image",),
            pretrain=("laptop", "--modalities", "image", "text", "--matching", "diagonal"),
        ),
        "geoprior": dataclasses.replace(_GEOPRIOR, title="geo prior x image only", prior=("laptop",)),
        "softmax": dataclasses.replace(_SOFTMAX, title="place-and-date softmax x image only"),
        "experts": System(
            title="ours, two experts, no pre-training", finetune=("laptop", *_ALONE)
        ),
        "paper": System(
            title="ours, the paper's classifier", paper=84.44, pretrain=("laptop",), shares="best",
            finetune=("laptop-image", *_META, *_MOVED, "--meta-lr", "3e-3"),
        ),
        "doubting": dataclasses.replace(_DOUBTING, title="ours, two experts, places doubted"),
        "best": System(title="ours, two experts", pretrain=("laptop",), finetune=("laptop",)),
    },
}  # fmt: skip


def chains(systems: dict[str, System]) -> list[tuple[str, ...]]:
    """Systems in groups of which none waits for another: those that build on one another, together."""
    groups: dict[str, list[str]] = {}
    for name, system in systems.items():
        groups.setdefault(system.of or system.shares or name, []).append(name)
    return [tuple(names) for names in groups.values()]
