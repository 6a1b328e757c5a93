"""The reproduction of benchopt's bilevel problems: value functions are what they say, and the command runs through."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.reproduction.__main__ import main
from benchmarks.reproduction.cleaning import Cleaning
from benchmarks.reproduction.driver import make_driver
from benchmarks.reproduction.loading import CONTENTS, MissingDataError, load_classification, load_digits
from benchmarks.reproduction.methods import ENTRIES, FAMILIES
from benchmarks.reproduction.quadratics import Quadratics
from benchmarks.reproduction.regression import Regularisation
from benchmarks.reproduction.results import curve, final, reached
from benchmarks.reproduction.run import run, tune
from benchmarks.reproduction.suite import SUITE, Case
from benchmarks.reproduction.task import Task
from benchmarks.reproduction.work import read, write
from bilevel import Unrolled, hypergradient
from bilevel.hypergrad import available_methods

DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def small_regularisation() -> Regularisation:
    generator = torch.Generator().manual_seed(3)
    truth = torch.tensor([1.0, -1.0, 0.0, 0.5])

    def part(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(size, 4, generator=generator)
        return x, torch.where(x @ truth + torch.randn(size, generator=generator) > 0, 1.0, -1.0)

    return Regularisation("small", part(200), part(100), seed=0)


def small_cleaning(ratio: float = 0.5) -> Cleaning:
    generator = torch.Generator().manual_seed(5)
    digits = torch.randint(10, (400,), generator=generator)
    centres = torch.randn(10, 12, generator=generator)
    images = centres[digits] + 0.3 * torch.randn(400, 12, generator=generator)
    images[:, 0] = 0.0  # a pixel that is never lit
    return Cleaning(images, digits, ratio, seed=1, num_train=200, num_valid=100)


SMALL = {
    "quadratics": lambda: Quadratics(7, size=64, dimension=6),
    "regularisation": small_regularisation,
    "cleaning": small_cleaning,
}


@pytest.fixture(params=SMALL)
def task(request: pytest.FixtureRequest) -> Task:
    return SMALL[request.param]()


def test_the_inner_solution_is_stationary_and_no_start_matters(task: Task) -> None:
    lam = task.outer_start.double() + 0.3
    w = task.solve(lam, task.inner_start).clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(task.inner_loss(w, lam), w)
    assert float(slope.norm()) < 2e-5
    far = task.solve(lam, task.inner_start + 0.5)
    torch.testing.assert_close(far, w.detach(), atol=1e-4, rtol=0)


def test_the_value_function_s_slope_is_the_exact_hypergradient(task: Task) -> None:
    lam, near = task.outer_start.double(), task.inner_start
    direction = torch.randn(lam.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-3
    slope = (task.value(lam + step * direction, near) - task.value(lam - step * direction, near)) / (2 * step)
    w = task.solve(lam, near)
    exact = hypergradient(task.inner_loss, task.outer_loss, w, lam, "exact").grad
    assert slope == pytest.approx(float((exact * direction).sum()), rel=1e-4)


def test_full_losses_are_means_of_their_blocks(task: Task) -> None:
    w, lam = task.inner_start.double() + 0.1, task.outer_start.double()
    for loss, size in ((task.inner_loss, task.num_inner), (task.outer_loss, task.num_outer)):
        half = size // 2
        parts = [loss(w, lam, slice(0, half)), loss(w, lam, slice(half, 2 * half))]
        assert size == 2 * half
        torch.testing.assert_close(loss(w, lam), (parts[0] + parts[1]) / 2)


def test_nothing_lies_below_the_lowest_value(task: Task) -> None:
    lowest = task.lowest([task.outer_start.double()])
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 5.0):
        lam = task.outer_start.double() + scale * torch.randn(
            task.outer_start.shape, generator=generator, dtype=torch.float64
        )
        assert task.value(lam, task.inner_start) >= lowest - 1e-9


def test_the_quadratic_s_minimum_is_reached_by_newton_s_step() -> None:
    task = Quadratics(7, size=64, dimension=6)
    lam = task.outer_start
    slope = hypergradient(task.inner_loss, task.outer_loss, task.solve(lam, lam), lam, "exact").grad
    lam = lam - torch.linalg.solve(task.curvature, slope)
    assert task.value(lam, lam) == pytest.approx(task.lowest([]), rel=1e-9)
    assert hypergradient(task.inner_loss, task.outer_loss, task.solve(lam, lam), lam, "exact").grad.norm() < 1e-8


@pytest.mark.parametrize("name", ["identity", "neumann", "conjugate_gradient"])
def test_a_biased_method_ends_where_its_own_hypergradient_vanishes(name: str) -> None:
    task = Quadratics(7, size=64, dimension=6)
    matrix, unit = task.inner.hessian, torch.eye(6, dtype=torch.float64)
    powers = [torch.linalg.matrix_power(unit - matrix / task.smoothness, power) for power in range(11)]
    inverse = {"identity": unit, "neumann": sum(powers) / task.smoothness, "conjugate_gradient": matrix.inverse()}[name]
    lam = task.end_of(inverse)
    method = {"method": name, **({"terms": 10, "step_size": 1 / task.smoothness} if name == "neumann" else {})}
    found = hypergradient(task.inner_loss, task.outer_loss, task.solve(lam, lam), lam, method)
    # the solve stops at a relative residual of 1e-6
    assert float(found.grad.norm()) < 1e-5 * float(found.direct.norm())
    gap = task.value(lam, lam) - task.lowest([])
    assert gap > 1e-4 if name != "conjugate_gradient" else abs(gap) < 1e-8


def test_the_quadratics_are_benchopt_s() -> None:
    task = Quadratics(1)
    for part in (task.inner, task.outer):
        eigenvalues = torch.linalg.eigvalsh(part.hessian)
        # x has the covariance with spectrum [0.1, 1]; 1024 samples spread it by at most (1 + √(100/1024))²
        assert 0.1 * 0.45 < float(eigenvalues[0]) < 0.1
        assert 0.7 < float(eigenvalues[-1]) < 1.75
        singular = torch.linalg.svdvals(part.cross)
        assert float(singular[0]) < 0.1 + 3 * 0.1 * math.sqrt(100 / 1024) * 2
    assert task.inner.loss(task.inner_start, task.outer_start, slice(None)).dtype == torch.float64
    assert float(torch.linalg.eigvalsh(task.curvature)[0]) > 0


def test_the_share_of_wrong_labels() -> None:
    task = small_cleaning(ratio=0.5)
    assert 0.3 < float(task.wrong.float().mean()) < 0.6  # a tenth of those that are drawn again stay right
    assert float(small_cleaning(ratio=0.0).wrong.sum()) == 0


def test_every_registered_method_is_compared() -> None:
    compared = {name.split(" ")[0] for name in ENTRIES}
    ours = {cls.name for cls in available_methods().values() if cls.__module__.startswith("bilevel.hypergrad.")}
    assert compared >= ours - {"auto"}  # which is one of two others
    assert {entry.family for entry in ENTRIES.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_method_lowers_the_value_function(name: str) -> None:
    """In 15 outer steps on a small quadratic, with a step size that is safe for all of them."""
    task = Quadratics(7, size=64, dimension=6)
    case = Case("", lambda folder, seed: task, 1e9, 1e9, 0.1, 0.1, (1,), "")
    recipe = ENTRIES[name].recipe(task, 0.05)
    driver = make_driver(task, recipe, seed=1)
    before = task.value(driver.lam, driver.w) - task.lowest([])
    for _ in range(15):
        driver.step()
    assert case.budget > driver.cost > 0
    assert task.value(driver.lam, driver.w) - task.lowest([]) < 0.85 * before


def test_cost_is_counted_in_full_gradients() -> None:
    """Ten steps of unrolling by replay: 10 gradients, then a forward and two backward passes each, and one of F."""
    task = Quadratics(7, size=64, dimension=6)
    entry = ENTRIES["unrolled (replay)"]
    driver = make_driver(task, entry.recipe(task, 0.01), seed=0)
    assert driver.cost == 0
    driver.step()
    assert isinstance(entry.recipe(task, 0.01).method, Unrolled)
    assert driver.cost == 10 + 10 * 1.5 + 1
    # SOBA on batches of 1/16: a gradient and a product of f, a gradient of F
    soba = make_driver(task, ENTRIES["soba"].recipe(task, 0.01), seed=0)
    soba.step()
    assert soba.cost == pytest.approx((1.5 + 1) / 16)


def test_outer_passes_count_by_their_terms() -> None:
    task = small_cleaning()
    driver = make_driver(task, ENTRIES["identity"].recipe(task, 1.0), seed=0)
    driver.step()
    assert driver.cost == 10 + 1.5 + 100 / 200


def test_the_step_size_search_ends_at_the_best_of_its_neighbours() -> None:
    task = Quadratics(7, size=64, dimension=6)
    case = Case("", lambda folder, seed: task, 60, 5.0, 0.1, 0.1, (1,), "", tuning_seeds=(0, 2))
    for start in (0.003, 300.0):
        best, tried = tune(lambda seed: task, replace(case, outer_rate=start), ENTRIES["identity"], tries=12)
        places = sorted(tried)
        place = places.index(best)
        assert 0 < place < len(places) - 1
        assert tried[best] == min(tried.values())
    recorded = run(task, case, ENTRIES["identity"].recipe(task, 1e6), 1)
    assert recorded.ended.startswith("diverged") or not recorded.score < recorded.value[0]


def recorded(seed: int, values: list[float], ended: str = "") -> dict[str, object]:
    count = len(values)
    axis = [0.0, *(10.0**place for place in range(1, count))]
    points = list(range(-1, count - 1))
    return {"seed": seed, "points": points, "cost": axis, "seconds": axis, "value": values, "ended": ended}


def test_medians_ranges_and_crossings() -> None:
    cell = {"runs": [recorded(1, [2.0, 1.2, 1.02]), recorded(2, [3.0, 1.5, 1.1]), recorded(3, [3.0, 2.0, 1.002])]}
    minima = {"1": 1.0, "2": 1.0, "3": 1.0}
    end = final(cell, minima)
    assert (end.low, end.middle, end.high) == pytest.approx((0.001, 0.02, 0.05))
    line = curve(cell, minima)
    assert line.cost == [0.0, 10.0, 100.0]
    assert [spread.middle for spread in line.gap] == pytest.approx([1.0, 0.25, 0.02])
    jump = {**recorded(4, [3.0, 1.02]), "points": [-1, 1], "cost": [0.0, 60.0]}  # its first step passes two marks
    mixed = curve({"runs": [*cell["runs"][:2], jump]}, {**minima, "4": 1.0})
    assert mixed.cost == [0.0, 10.0, 100.0]
    assert [spread.middle for spread in mixed.gap] == pytest.approx([1.0, 0.2, 0.02])
    # the second run goes from 1/4 at 10 to 1/20 at 100: on logarithmic axes it passes 1/10 at 10^(1 + ln 2.5 / ln 5)
    crossing = 10 ** (1 + math.log(2.5) / math.log(5))
    assert reached({"runs": [cell["runs"][1]]}, minima, 0.1, "cost") == pytest.approx(crossing)
    assert reached(cell, minima, 1e-9, "cost") == math.inf
    broken = {"runs": [recorded(1, [2.0, 1.2], "diverged: NaN")]}
    assert final(broken, minima).middle == math.inf
    partly = curve({"runs": [*cell["runs"][1:], *broken["runs"]]}, minima)
    assert partly.cost == [0.0, 10.0, 100.0]
    assert [spread.middle for spread in partly.gap] == pytest.approx([1.0, 0.25, 0.05])
    assert partly.gap[-1].high == math.inf


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    page = "# Page\n\n<!-- table summary -->\nold\n<!-- end -->\n\n<!-- table quadratics -->\n<!-- end -->\nkept\n"
    (folder / "page.md").write_text(page)
    output = folder / "page"
    arguments = ["--output", str(output), "--problems", "quadratics", "--methods", "identity,conjugate_gradient"]
    assert main([*arguments, "--quick"]) == 0
    return output


def test_the_command_writes_results_pictures_and_tables(output: Path) -> None:
    problem = read(output / "results.json")["problems"]["quadratics"]
    assert list(problem["cells"]) == ["identity", "conjugate_gradient"]
    for cell in problem["cells"].values():
        assert [run["seed"] for run in cell["runs"]] == problem["seeds"]
        assert not set(problem["tuning_seeds"]) & set(problem["seeds"])
        end = final(cell, problem["minima"])
        assert 0 <= end.low <= end.middle <= end.high < 0.1
    assert "</svg>" in (output / "quadratics.svg").read_text()
    page = output.with_suffix(".md").read_text()
    assert "old" not in page
    assert page.endswith("<!-- end -->\nkept\n")
    assert page.count("| `conjugate_gradient` |") == 2


def test_a_second_run_keeps_the_other_methods(output: Path) -> None:
    before = read(output / "results.json")["problems"]["quadratics"]["cells"]["identity"]
    arguments = ["--output", str(output), "--problems", "quadratics", "--quick"]
    assert main([*arguments, "--methods", "neumann"]) == 0
    cells = read(output / "results.json")["problems"]["quadratics"]["cells"]
    assert list(cells) == ["identity", "neumann", "conjugate_gradient"]
    assert cells["identity"] == before


def test_results_survive_a_round_trip(tmp_path: Path) -> None:
    record = {"problems": {"p": {"cells": {"m": {"runs": [{"value": [1.0, math.inf]}]}}}}}
    write(tmp_path / "r.json", record)
    assert "Infinity" not in (tmp_path / "r.json").read_text()
    json.loads((tmp_path / "r.json").read_text())
    assert read(tmp_path / "r.json") == record


@pytest.mark.parametrize("folder", [None, Path("nowhere")])
@pytest.mark.parametrize("load", [lambda folder: load_classification(folder, "ijcnn1"), load_digits])
def test_missing_data_says_what_to_do(load, folder: Path | None) -> None:
    with pytest.raises(MissingDataError, match="--problems quadratics") as caught:
        load(folder)
    assert "data.npz" in str(caught.value)


def test_the_command_refuses_to_start_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path), "--output", str(tmp_path / "out"), "--problems", "ijcnn1"]) == 2
    assert str(tmp_path / "ijcnn1" / "data.npz") in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path), "--problems", "ijcnn2"])
    assert "ijcnn2" in capsys.readouterr().err


def test_packed_features_are_unpacked(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 2, (5, 11), dtype=np.uint8)
    packed, labels = np.packbits(x, axis=1), np.array([1, -1, 1, 1, -1], dtype=np.int8)
    (tmp_path / "adult_a9a").mkdir()
    arrays = {"X_train": packed, "X_test": packed[:2], "y_train": labels, "y_test": labels[:2], "n_features": 11}
    np.savez(tmp_path / "adult_a9a" / "data.npz", **arrays)
    train, test = load_classification(tmp_path, "adult_a9a")
    assert torch.equal(train[0], torch.from_numpy(x).float())
    assert torch.equal(test[1], torch.tensor([1.0, -1.0]))


@pytest.mark.skipif(not (DATA / "ijcnn1").is_dir(), reason=f"no data in {DATA.name}")
def test_the_real_data_is_what_the_suite_expects() -> None:
    for name, features, sizes in (("ijcnn1", 22, (49990, 15000)), ("adult_a9a", 123, (32561, 16281))):
        for (x, y), size in zip(load_classification(DATA, name), sizes, strict=True):
            assert x.shape == (size, features)
            assert set(y.unique().tolist()) == {-1.0, 1.0}
    images, digits = load_digits(DATA)
    assert images.shape == (10_000, 784)
    assert 0 <= float(images.min()) < float(images.max()) == 1
    assert digits.unique().tolist() == list(range(10))
    assert set(CONTENTS) == {"ijcnn1", "adult_a9a", "mnist10k"}
    assert set(SUITE) == {"quadratics", "ijcnn1", "a9a", "cleaning50", "cleaning80"}
