"""Two and four processes against one that has all rows: losses, averaged gradients, the order of rows."""

import itertools
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist  # noqa: TID251 - starts the processes and averages as DDP does
from torch import Tensor, nn
from torch.nn.functional import normalize

from xcon import evaluation, gather, losses
from xcon.sampler import Order

ROWS, WIDTH, EMBEDDING = 6, 5, 4  # rows of one process, numbers into and out of each tower
MODALITIES = ("image", "text", "meta")
SAMPLES = 11  # of the evaluated split: no multiple of anything here
Case = tuple[Tensor, dict[str, Tensor]]


class Towers(nn.Module):
    """A linear tower per modality and a scale; the same weights wherever it is built."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.towers = nn.ModuleDict({m: nn.Linear(WIDTH, EMBEDDING, dtype=torch.float64) for m in MODALITIES})
        self.log_scale = nn.Parameter(torch.tensor(2.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {m: normalize(tower(x), dim=1) for m, tower in self.towers.items()}, self.log_scale.exp()


def inputs(world_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(world_size * ROWS, WIDTH, generator=generator, dtype=torch.float64)


def cases(world_size: int) -> dict[str, Case]:
    """Name -> labels and masks of the global batch."""
    rows = world_size * ROWS
    generator = torch.Generator().manual_seed(4)
    scattered = {m: torch.rand(rows, generator=generator) < 0.6 for m in ("image", "meta")}
    last_has_none = {m: torch.arange(rows) < rows - ROWS for m in MODALITIES}
    return {
        "all present": (torch.arange(rows) % 5, {}),
        "uneven classes": ((torch.arange(rows) ** 2 // 20).clamp(max=7), {}),
        "a class per process": (torch.arange(rows) // ROWS, {}),
        "one class": (torch.zeros(rows, dtype=torch.long), {}),
        "a class per row": (torch.arange(rows), {}),
        "scattered masks": (torch.arange(rows) % 3, scattered),
        "a process without metadata": (torch.arange(rows) % 4, {"meta": torch.arange(rows) >= ROWS}),
        "a process without any row": (torch.arange(rows) % 4, last_has_none),
        "nobody has metadata": (torch.arange(rows) % 4, {"meta": torch.zeros(rows, dtype=torch.bool)}),
    }


def work(rank: int, world_size: int, folder: str) -> None:
    """What one process does; it leaves what it found in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    found = {
        "rows": gather.rows(torch.arange(2) + 10 * rank),
        "flags": gather.rows(torch.tensor([rank == 0, rank == 1, True])),
        "columns": gather.rows(torch.arange(6).view(2, 3).T + 10 * rank),  # not contiguous
        "world_size": gather.world_size(),
        "agreed": gather.agree({"loss": 0.1 + rank, "top1": 1 / (rank + 3)}, torch.device("cpu")),
        "statistics": statistics(rank),
        "squares": squares(rank, world_size),
    }
    for name, (labels, present) in cases(world_size).items():
        found[name] = one_step(labels, present, rank, world_size)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def one_step(labels: Tensor, present: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """Losses, and gradients averaged over processes as DDP and ZeRO do."""
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    model = Towers()
    embeddings, scale = model(inputs(world_size)[mine])
    masks = {m: mask[mine] for m, mask in present.items()}
    terms = gather.cross_contrastive(embeddings, labels[mine], scale, present=masks)
    terms["total"].backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
    gradients = {name: p.grad / world_size for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: term.detach() for name, term in terms.items()}, **gradients}


def statistics(rank: int) -> Tensor:
    """Running means of a BatchNorm that saw the rank, after they are shared."""
    norm = nn.BatchNorm1d(1, momentum=1.0)
    norm(torch.tensor([[float(rank)], [float(rank)]]))
    gather.share_buffers(norm)
    return norm.running_mean


def squares(rank: int, world_size: int) -> dict[str, Tensor]:
    """An evaluation whose compute squares the record's number."""
    order = Order(SAMPLES, 4 * world_size, seed=None)
    batches = [
        {
            "index": torch.tensor([index for _, index, _ in items]),
            "weight": torch.tensor([weight for *_, weight in items]),
            "label": torch.tensor([index % 3 for _, index, _ in items]),
        }
        for items in order.local_batches(steps=range(order.steps_per_epoch), rank=rank, world_size=world_size)
    ]
    return evaluation.collect(
        batches,
        lambda batch: {"square": batch["index"] ** 2, "odd": batch["index"] % 2 == 1},
        samples=SAMPLES,
        device=torch.device("cpu"),
    )


def alone(labels: Tensor, present: dict[str, Tensor], world_size: int) -> dict[str, Tensor]:
    """The same step by one process with all rows."""
    model = Towers()
    embeddings, scale = model(inputs(world_size))
    terms = losses.cross_contrastive(embeddings, labels, scale, present=present)
    terms["total"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: term.detach() for name, term in terms.items()}, **gradients}


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of the processes found."""
    folder = tmp_path_factory.mktemp("gather")
    # A server that has imported torch once forks the processes: importing it in each takes a minute in all.
    multiprocessing.set_forkserver_preload(["xcon.evaluation", "pytest"])
    torch.multiprocessing.start_processes(
        work, (request.param, str(folder)), nprocs=request.param, start_method="forkserver"
    )
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("case", cases(2))
def test_losses_are_those_of_one_process_with_all_rows(found: list[dict], case: str) -> None:
    expected = alone(*cases(len(found))[case], len(found))
    names = [f"{a}->{b}" for a, b in itertools.permutations(MODALITIES, 2)]
    for result, name in itertools.product(found, [*names, "total"]):
        assert result[case][name].item() == pytest.approx(expected[name].item(), rel=0, abs=1e-12), name


@pytest.mark.parametrize("case", cases(2))
def test_mean_gradients_are_those_of_one_process_with_all_rows(found: list[dict], case: str) -> None:
    expected = alone(*cases(len(found))[case], len(found))
    for result, (name, _) in itertools.product(found, Towers().named_parameters()):
        torch.testing.assert_close(result[case][name], expected[name], rtol=0, atol=1e-10, msg=name)
    assert any(value.abs().max() > 1e-3 for name, value in expected.items() if name.startswith("towers"))


def test_rows_come_in_order_of_rank(found: list[dict]) -> None:
    expected = [10 * rank + i for rank in range(len(found)) for i in range(2)]
    assert [result["rows"].tolist() for result in found] == [expected] * len(found)


def test_flags_stay_flags(found: list[dict]) -> None:
    """Rank 0 gives (true, false, true), rank 1 (false, true, true), the others (false, false, true)."""
    expected = [[r == 0, r == 1, True] for r in range(len(found))]
    assert all(result["flags"].dtype == torch.bool for result in found)
    assert all(result["flags"].tolist() == list(itertools.chain(*expected)) for result in found)


def test_rows_need_not_be_contiguous(found: list[dict]) -> None:
    expected = [[i + 10 * rank, i + 3 + 10 * rank] for rank in range(len(found)) for i in range(3)]
    assert all(result["columns"].tolist() == expected for result in found)


def test_evaluation_has_every_record_once_in_order(found: list[dict]) -> None:
    for result in found:
        assert result["squares"]["square"].tolist() == [i * i for i in range(SAMPLES)]
        assert result["squares"]["odd"].tolist() == [i % 2 == 1 for i in range(SAMPLES)]
        assert result["squares"]["label"].tolist() == [i % 3 for i in range(SAMPLES)]


def test_all_take_the_first_process_s_numbers(found: list[dict]) -> None:
    assert all(result["agreed"] == {"loss": 0.1, "top1": 1 / 3} for result in found)
    assert all(result["statistics"].tolist() == [0.0] for result in found)


def test_processes_know_their_number(found: list[dict]) -> None:
    assert [result["world_size"] for result in found] == [len(found)] * len(found)


def test_alone_it_is_the_plain_loss() -> None:
    assert gather.world_size() == 1
    labels, present = cases(1)["scattered masks"]
    embeddings, scale = Towers()(inputs(1))
    one = gather.cross_contrastive(embeddings, labels, scale, present=present)
    two = losses.cross_contrastive(embeddings, labels, scale, present=present)
    assert {n: v.item() for n, v in one.items()} == {n: v.item() for n, v in two.items()}
    assert torch.equal(gather.rows(labels), labels)
