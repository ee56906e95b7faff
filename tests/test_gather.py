"""Two and four processes against one that has all rows: losses, averaged gradients, the order of rows."""

import itertools
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist  # noqa: TID251 - starts the processes and averages as DDP does
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from xcon import evaluation, gather, losses
from xcon.sampler import Order

ROWS, WIDTH, EMBEDDING = 6, 5, 4  # rows of one process, numbers into and out of each tower
MODALITIES = ("image", "text", "meta")
SAMPLES = 11  # of the evaluated split: no multiple of anything here
CAPTIONS = 8  # labels are numbers below this in the cases with a vector per class
Case = tuple[Tensor, dict[str, Tensor]]
PATHS = ("tables", "blocks", "blocks, text per class", "tables, text per class")


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
        "largest": [gather.largest(10 * (rank == 1)), gather.largest(0), gather.largest(rank)],
        "statistics": statistics(rank),
        "squares": squares(rank, world_size),
    }
    for path in PATHS:
        losses.TABLE_ROWS = 10**6 if path.startswith("tables") else 0
        for name, (labels, present) in cases(world_size).items():
            found[f"{path}: {name}"] = one_step(labels, present, rank, world_size, shared="per class" in path)
    found["sent"] = sent(world_size)
    found["relatives"] = relatives(rank, world_size)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def captions(labels: Tensor, rank: int, world_size: int) -> Tensor:
    """This process's part of the distinct labels, filled up with -1, a label that no row has."""
    distinct = labels.unique().flip(0)
    each = -(-len(distinct) // world_size)
    filled = torch.cat([distinct, torch.full((each * world_size - len(distinct),), -1)])
    return filled[rank * each : (rank + 1) * each]


def embed(model: Towers, rank: int, world_size: int, shared: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """Unit vectors of this process's rows; of text, where `shared` labels are given, one for each of them."""
    embeddings, scale = model(inputs(world_size)[rank * ROWS : (rank + 1) * ROWS])
    if shared is not None:
        described = captioned(world_size)[shared]  # the padding's is whatever stands last
        embeddings["text"] = normalize(model.towers["text"](described), dim=1)
    return embeddings, scale


def captioned(world_size: int) -> Tensor:
    """`[N, WIDTH]` what the text tower is given for each label."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(world_size * ROWS + 1, WIDTH, generator=generator, dtype=torch.float64)


def one_step(
    labels: Tensor, present: dict[str, Tensor], rank: int, world_size: int, *, shared: bool
) -> dict[str, Tensor]:
    """Losses, and gradients averaged over processes as DDP and ZeRO do."""
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    model = Towers()
    own_captions = captions(labels, rank, world_size) if shared else None
    embeddings, scale = embed(model, rank, world_size, own_captions)
    masks = {m: mask[mine] for m, mask in present.items()}
    classes = {} if own_captions is None else {"text": own_captions}
    terms = gather.cross_contrastive(embeddings, labels[mine], scale, present=masks, classes=classes)
    weighted(terms).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
    gradients = {name: p.grad / world_size for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: term.detach() for name, term in terms.items()}, **gradients}


def weighted(terms: dict[str, Tensor]) -> Tensor:
    """The total, and each direction once more with a weight of its own, so that none can stand for another."""
    directions = sorted(name for name in terms if name != "total")
    return terms["total"] + sum(
        (0.1 * i * terms[name] for i, name in enumerate(directions)), torch.zeros((), dtype=torch.float64)
    )


def sent(world_size: int) -> dict[str, list[int]]:
    """Bytes that a process puts into each collective of the loss, forward and backward, text per class."""
    calls: dict[str, list[int]] = {"forward": [], "backward": []}
    labels = torch.arange(world_size * ROWS) % CAPTIONS
    rank = dist.get_rank()
    embeddings, scale = embed(Towers(), rank, world_size, captions(labels, rank, world_size))
    losses.TABLE_ROWS = 0
    with Collectives() as seen:
        own = labels[rank * ROWS : (rank + 1) * ROWS]
        classes = {"text": captions(labels, rank, world_size)}
        terms = gather.cross_contrastive(embeddings, own, scale, classes=classes)
        calls["forward"] = seen.take()
        terms["total"].backward()
        calls["backward"] = seen.take()
        losses.TABLE_ROWS = 10**6
        embeddings, scale = Towers()(inputs(world_size)[rank * ROWS : (rank + 1) * ROWS])
        gather.cross_contrastive(embeddings, own, scale)["total"].backward()
        calls["tables"] = seen.take()
    return calls


class Collectives(TorchDispatchMode):
    """Counts whatever operator of c10d is called, and the bytes it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def take(self) -> list[int]:
        taken, self.calls = self.calls, []
        return taken

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("c10d") or func.namespace.startswith("_c10d"):
            inputs_ = args[1] if "allgather" in str(func) else args[0]
            self.calls.append(
                sum(t.nbytes for t in torch.utils._pytree.tree_leaves(inputs_) if isinstance(t, Tensor))
            )
        return func(*args, **(kwargs or {}))


def relatives(rank: int, world_size: int) -> dict[str, Tensor]:
    """supcon and siglip, with gradients averaged over processes."""
    labels = torch.arange(world_size * ROWS) % 5
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    model = Towers()
    embeddings, scale = model(inputs(world_size)[mine])
    mask = (torch.arange(world_size * ROWS) % 3 > 0)[mine]
    views = torch.stack([embeddings["image"], embeddings["meta"]], dim=1)
    one = gather.supcon(views, labels[mine], scale, present=mask)
    two = gather.siglip(embeddings, labels[mine], scale, scale - 20, present={"meta": mask})
    (one + two["total"]).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    gradients = {name: p.grad / world_size for name, p in model.named_parameters() if p.grad is not None}
    return {"supcon": one.detach(), "siglip": two["total"].detach(), **gradients}


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


def alone(labels: Tensor, present: dict[str, Tensor], world_size: int, *, shared: bool) -> dict[str, Tensor]:
    """The same step by the definition, one process with all rows and a text vector for each."""
    model = Towers()
    embeddings, scale = model(inputs(world_size))
    if shared:
        embeddings["text"] = normalize(model.towers["text"](captioned(world_size)[labels]), dim=1)
    terms = losses.by_definition(embeddings, labels, scale, present=present)
    weighted(terms).backward()
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


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", cases(2))
def test_losses_are_those_of_one_process_with_all_rows(found: list[dict], case: str, path: str) -> None:
    expected = alone(*cases(len(found))[case], len(found), shared="per class" in path)
    names = [f"{a}->{b}" for a, b in itertools.permutations(MODALITIES, 2)]
    for result, name in itertools.product(found, [*names, "total"]):
        value = result[f"{path}: {case}"][name].item()
        assert value == pytest.approx(expected[name].item(), rel=0, abs=1e-12), name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", cases(2))
def test_mean_gradients_are_those_of_one_process_with_all_rows(found: list[dict], case: str, path: str) -> None:
    expected = alone(*cases(len(found))[case], len(found), shared="per class" in path)
    for result, (name, _) in itertools.product(found, Towers().named_parameters()):
        torch.testing.assert_close(result[f"{path}: {case}"][name], expected[name], rtol=0, atol=1e-10, msg=name)
    if case != "nobody has metadata":
        assert all(v.abs().max() > 1e-3 for name, v in expected.items() if name.startswith("towers"))


def test_two_gathers_forward_and_nothing_backward(found: list[dict]) -> None:
    """Sent by each process, in numbers of 8 bytes: image and meta b D, text k D, labels b, classes k; then the
    log-sum-exps: image and meta two each per row, text two per caption. k = ceil(8 captions / W)."""
    k = -(-CAPTIONS // len(found))
    first = 2 * ROWS * EMBEDDING + k * EMBEDDING + ROWS + k
    second = 4 * ROWS + 2 * k
    for result in found:
        assert result["sent"]["forward"] == [8 * first, 8 * second]
        assert result["sent"]["backward"] == []
        assert result["sent"]["tables"] == [8 * (3 * ROWS * EMBEDDING + ROWS)]


def test_relatives_are_those_of_one_process_with_all_rows(found: list[dict]) -> None:
    rows = len(found) * ROWS
    model = Towers()
    embeddings, scale = model(inputs(len(found)))
    labels, mask = torch.arange(rows) % 5, torch.arange(rows) % 3 > 0
    one = losses.supcon(torch.stack([embeddings["image"], embeddings["meta"]], dim=1)[mask], labels[mask], scale)
    two = losses.siglip(embeddings, labels, scale, scale - 20, present={"meta": mask})
    (one + two["total"]).backward()
    for result in found:
        assert result["relatives"]["supcon"].item() == pytest.approx(one.item(), rel=1e-12)
        assert result["relatives"]["siglip"].item() == pytest.approx(two["total"].item(), rel=1e-12)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(result["relatives"][name], parameter.grad, rtol=0, atol=1e-10, msg=name)


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


def test_all_know_the_largest_number(found: list[dict]) -> None:
    """Of 10 from the second process alone, of none but 0, of the ranks."""
    assert all(result["largest"] == [10, 0, len(found) - 1] for result in found)
    assert gather.largest(7) == 7


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
