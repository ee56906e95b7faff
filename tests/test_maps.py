"""Maps: grids by hand, land and sea where they are known to be, drawn pixels, the model's own scores."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from xcon import cartography, classifier, commandline, images, maps, model, records
from xcon.encoders import ImageSpec, MetaSpec

WORLD = (-180.0, -90.0, 180.0, 90.0)
NORTH_AMERICA = (-140.0, 15.0, -50.0, 65.0)
NAMES = ("European Starling (Adult)", "European  Starling (Juvenile)", "Osprey", "Barn Owl")


def test_grid_by_hand() -> None:
    """10 by 4 degrees in cells of 2: centres 1 degree inside, rows from north to south."""
    lon, lat = cartography.grid((-120, 40, -110, 44), 2)
    assert lon.tolist() == [-119, -117, -115, -113, -111]
    assert lat.tolist() == [43, 41]


def test_grid_of_the_world_tiles_it() -> None:
    lon, lat = cartography.grid(WORLD, 0.5)
    assert (len(lon), len(lat)) == (720, 360)
    assert (lon[0], lon[-1], lat[0], lat[-1]) == (-179.75, 179.75, 89.75, -89.75)


def test_a_step_that_does_not_divide_the_region_gives_way() -> None:
    """10 degrees in cells of about 3: three cells of 3 1/3, centres at 5/3, 5, 25/3; nothing sticks out."""
    lon, lat = cartography.grid((0, 0, 10, 3), 3)
    assert lon.tolist() == pytest.approx([5 / 3, 5, 25 / 3])
    assert lat.tolist() == [1.5]


@pytest.mark.parametrize(
    ("region", "step", "message"),
    [
        ((10, 0, -10, 5), 1, "west < east"),
        ((-190, 0, 10, 5), 1, r"within \[-180, 180\]"),
        ((0, 40, 10, 95), 1, r"within \[-90, 90\]"),
        ((0, 50, 10, 40), 1, "south < north"),
        ((0, float("nan"), 10, 40), 1, "south < north"),
        ((0, 0, 10, 10), 11, "--step 11"),
        ((0, 0, 10, 10), 0, "--step 0"),
        ((0, 0, 10, 10), float("nan"), "--step nan"),
    ],
)
def test_impossible_regions_are_refused(region: cartography.Region, step: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cartography.grid(region, step)


def test_land_where_it_is_known() -> None:
    """Denver, Berlin and Ayers Rock are land; the middle of the Atlantic, of the Pacific, and the Gulf not.
    All combinations of a row of longitudes and one of latitudes, each in its own cell."""
    land = {"Denver": (-104.99, 39.74), "Berlin": (13.40, 52.52), "Uluru": (131.04, -25.34)}
    sea = {"Atlantic": (-40.0, 30.0), "Pacific": (-150.0, 0.0), "Gulf of Mexico": (-90.0, 25.0)}
    for expected, places in ((True, land), (False, sea)):
        for name, (lon, lat) in places.items():
            assert cartography.land_mask(np.array([lon]), np.array([lat])).item() is expected, name
    both = cartography.land_mask(np.array([-104.99, -40.0, 13.40]), np.array([52.52, 30.0]))
    assert both.shape == (2, 3)
    assert both[0, 2]
    assert not both[1, 1]


def test_edges_of_the_world_are_places_too() -> None:
    """The south pole is land, the north pole sea; at +-180 degrees, Fiji's latitude aside, there is sea at 0."""
    found = cartography.land_mask(np.array([-180.0, 180.0]), np.array([90.0, 0.0, -90.0]))
    assert found.tolist() == [[False, False], [False, False], [True, True]]


def colour_at(figure: Figure, lon: float, lat: float) -> tuple[float, ...]:
    canvas = figure.canvas
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[attr-defined]
    x, y = figure.axes[0].transData.transform((lon, lat))
    return tuple(pixels[len(pixels) - 1 - int(y), int(x), :3] / 255)


def draw(region: cartography.Region, step: float, points: cartography.Places | None = None) -> Figure:
    """West of 100 degrees W the probability is 0.2, east of it 0.8."""
    lon, lat = cartography.grid(region, step)
    probability = np.broadcast_to(np.where(lon < -100, 0.2, 0.8), (len(lat), len(lon)))
    return cartography.species_figure(probability, lon, lat, title="Osprey\nsmall", points=points)


@pytest.mark.parametrize(("region", "step"), [(WORLD, 2.0), (NORTH_AMERICA, 1.0)])
def test_pixels_have_the_colour_of_their_place(region: cartography.Region, step: float) -> None:
    """Colours run from 0 to the largest, 0.8: a quarter of the way in Nevada, its end in Ohio; the ocean is
    masked, whatever its probability."""
    figure = draw(region, step)
    close = pytest.approx
    assert colour_at(figure, -116.3, 39.2) == close(colormaps["magma_r"](0.25)[:3], abs=0.02)
    assert colour_at(figure, -82.3, 41.0 - 0.7) == close(colormaps["magma_r"](1.0)[:3], abs=0.02)
    for lon, lat in ((-55.3, 33.3), (-132.3, 41.3), (-91.3, 26.1)):
        assert colour_at(figure, lon, lat) == close(to_rgb(cartography.OCEAN), abs=0.01)


def test_points_are_marked_where_they_are() -> None:
    places = cartography.Places(lon=np.array([-116.3]), lat=np.array([39.2]))
    assert colour_at(draw(NORTH_AMERICA, 1.0, places), -116.3, 39.2) == pytest.approx(
        to_rgb(cartography.RECORDS), abs=0.01
    )


def test_a_degree_of_latitude_is_longer_where_the_region_is_northern() -> None:
    """Middle latitude 40: 1 / cos(40 degrees) = 1.3054. The world's is 0: 1."""
    for region, ratio in ((NORTH_AMERICA, 1.3054), (WORLD, 1.0)):
        figure = draw(region, 2.0)
        figure.canvas.draw()
        to_pixels = figure.axes[0].transData
        (x0, y0), (x1, y1) = to_pixels.transform((-100, 40)), to_pixels.transform((-99, 41))
        assert (y1 - y0) / (x1 - x0) == pytest.approx(ratio, rel=1e-3)


def test_the_scale_ends_at_the_largest_probability_on_land() -> None:
    """A peak in the middle of the Atlantic is not seen and must not darken nor fade the rest."""
    lon, lat = cartography.grid(WORLD, 10)
    probability = np.full((18, 36), 0.1)
    probability[5, 14] = 1.0  # 35 W, 35 N
    figure = cartography.species_figure(probability, lon, lat, title="Osprey")
    assert figure.axes[0].images[0].get_clim() == (0.0, 0.1)


@pytest.mark.parametrize(
    "region",
    [
        (-45.0, 20.0, -40.0, 25.0),  # all ocean: no coast, nothing to scale
        (-106.0, 38.0, -104.0, 40.0),  # all land
        (0.0, 80.0, 90.0, 90.0),  # at a pole
        (170.0, -50.0, 180.0, 50.0),  # at the date line, taller than wide
        (-180.0, -1.0, 180.0, 1.0),  # a strip
    ],
)
def test_unusual_regions_are_drawn(region: cartography.Region, tmp_path: Path) -> None:
    lon, lat = cartography.grid(region, 1.0)
    out = tmp_path / "map.png"
    cartography.draw_species(np.zeros((len(lat), len(lon))), lon, lat, title="Osprey\n" + "a " * 90, out=out)
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert max(picture.size) <= 150 * 11
        assert np.asarray(picture.convert("L")).std() > 5  # not one colour


def test_a_map_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "missing" / "map.png"
    with pytest.raises(OSError, match=r"map\.png: cannot be written"):
        cartography.draw_species(np.zeros((2, 2)), *cartography.grid((0, 0, 2, 2), 1), title="Osprey", out=out)


@pytest.mark.parametrize(
    ("value", "signs", "text"), [(-60, "EW", "60\u00b0 W"), (7.5, "NS", "7.5\u00b0 N"), (0, "NS", "0\u00b0")]
)
def test_degrees_are_named(value: float, signs: str, text: str) -> None:
    assert cartography._degrees(value, 0, signs=signs) == text


def test_species_are_found_by_name() -> None:
    """A whole name is one class; without its parentheses it is all its plumages."""
    assert records.classes_called(NAMES, "osprey") == [2]
    assert records.classes_called(NAMES, "European Starling (juvenile)") == [1]
    assert records.classes_called(NAMES, " European  Starling") == [0, 1]
    with pytest.raises(ValueError, match="'Ospray': no such class here; did you mean 'Osprey'"):
        records.classes_called(NAMES, "Ospray")
    with pytest.raises(ValueError, match=r"classes are 'European Starling \(Adult\)' and so on"):
        records.classes_called(NAMES, "zzz")


def write_run(folder: Path, *, sees_image: bool = True, sees_meta: bool = True) -> Path:
    """An untrained classifier of four classes, saved as fine-tuning does."""
    torch.manual_seed(0)
    spec = model.ModelSpec(
        kind="classifier",
        method="none",
        embed_dim=8,
        hidden=16,
        image=ImageSpec("resnet10t", {}, 32, (0.5,) * 3, (0.5,) * 3, 1.0, "bilinear") if sees_image else None,
        text=None,
        meta=MetaSpec(width=16, depth=1) if sees_meta else None,
        classes=tuple({"class_id": n, "raw_class_id": n, "name": name} for n, name in enumerate(NAMES)),
        shards_sha256="ab",
    )
    network = classifier.build(spec, model.build_towers(spec), prior=torch.ones(len(NAMES)))
    folder.mkdir()
    model.save(folder, spec, model.weights_to_bytes(network.state_dict()))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("maps") / "run")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photo") / "bird.png"
    noise = np.random.default_rng(0).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    return file


def test_probability_is_the_models_own_at_every_place(run: Path, photo: Path) -> None:
    """The plain route: photograph and one place at a time through the whole network. On 2 July of a common
    year, day 183 of 365, the fraction is 182 / 364 = 0.5."""
    network, spec = classifier.load(run)
    lon, lat = cartography.grid((-120, 30, -60, 60), 15)
    held = maps.held_constant(network, spec, photo)
    settings = {"lon": lon, "lat": lat, "date": "2026-07-02"}
    found = maps.species_probability(network, held, [0, 1], **settings, batch=3)
    assert found.shape == (2, 4)
    pixels = images.decode(photo.read_bytes())[None]
    for row in range(2):
        for column in range(4):
            meta = torch.tensor([[lon[column], lat[row], 0.5]], dtype=torch.float32)
            with torch.inference_mode():
                alone = network.score({"image": pixels, "meta": meta}).softmax(dim=1)[0, :2].sum()
            assert found[row, column] == pytest.approx(float(alone), abs=1e-6)
    assert found.std() > 0
    others = maps.species_probability(network, held, [2, 3], **settings, batch=100)
    assert found + others == pytest.approx(np.ones((2, 4)), abs=1e-6)


def test_a_run_and_its_photograph_must_fit(run: Path, photo: Path, tmp_path: Path) -> None:
    network, spec = classifier.load(run)
    with pytest.raises(ValueError, match="sees a photograph, name one"):
        maps.held_constant(network, spec, None)
    with pytest.raises(FileNotFoundError, match=r"--image .*none\.jpg: no such file"):
        maps.held_constant(network, spec, tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("no photograph")
    with pytest.raises(ValueError, match=r"--image .*text\.jpg: not an image"):
        maps.held_constant(network, spec, tmp_path / "text.jpg")
    with pytest.raises(ValueError, match="all places are alike"):
        maps.held_constant(network, dataclasses.replace(spec, meta=None), photo)
    network, spec = classifier.load(write_run(tmp_path / "meta", sees_image=False))
    assert maps.held_constant(network, spec, None) == {}
    with pytest.raises(ValueError, match="sees no photograph"):
        maps.held_constant(network, spec, photo)


def command_line(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["map", *map(str, arguments)])


def test_command_draws_a_map(run: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, with a region whose numbers are negative; same colours as the probability says."""
    out = tmp_path / "map.png"
    wanted = ("species", run, "--species", "european starling", "--image", photo, "--out", out)
    command_line(monkeypatch, *wanted, "--region", "-130", "20", "-60", "55", "--step", "5")
    maps.main()
    with Image.open(out) as picture:
        assert picture.size[0] > 800


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "map.jpg"), r"map\.jpg: a name ending in \.png"),
        (("--out", "map.png", "--date", "July"), "'July' is no ISO date"),
        (("--out", "map.png", "--batch", "0"), "--batch 0"),
        (("--out", "map.png", "--region", "0", "95", "1", "96"), "--region 0 95 1 96"),
        (("--out", "map.png", "--colour", "red"), "--colour"),
        ((), "--out"),
    ],
)
def test_wrong_usage(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str) -> None:
    command_line(monkeypatch, "species", "run", "--species", "Osprey", *arguments)
    with pytest.raises(ValueError, match=message):
        commandline.parse(maps.Settings, maps.PROGRAM)


def test_a_users_mistake_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command_line(monkeypatch, "species", tmp_path / "no", "--species", "Osprey", "--out", tmp_path / "m.png")
    with pytest.raises(SystemExit) as stop:
        maps.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"xcon map: {tmp_path}/no: no such run folder\n"


def test_title_says_what_is_shown() -> None:
    settings = maps.Settings(what="species", run=Path("r"), species="Osprey", out=Path("o.png"))
    assert maps.species_title(settings, 1) == (
        "Osprey\nProbability at each place on 2026-07-01, no photograph; the date held constant"
    )
    settings = dataclasses.replace(settings, image=Path("a/b.jpg"))
    assert maps.species_title(settings, 2) == (
        "Osprey (sum of 2 plumages)\nProbability at each place on 2026-07-01; the photograph b.jpg and the date "
        "held constant"
    )
