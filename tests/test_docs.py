"""Every block of code in the README and the documentation is executed, or held against what it speaks of."""

from __future__ import annotations

import contextlib
import doctest
import inspect
import io
import json
import re
import runpy
import shlex
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement

import bidora
import bidora.cli
import bilevel
import bilevel.callbacks
import bilevel.cli
import bilevel.problems
import bilevel.single_loop
from bidora.settings import TrainSettings
from bilevel import Engine, EngineConfig, RunConfig, load_config
from bilevel.errors import BilevelWarning
from bilevel.problems import Hyperparameters, Tuned, WeightDecay
from tests.pages import INDENTED, PAGES, ROOT, Block, blocks, name_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYTHON = ("python", "py")
COMMANDS = ("bash", "sh", "console")
SETTINGS = ("toml", "yaml", "json")
OUTPUT = "output"
"""What the block before prints; where that raises, the last line names the error."""
PLAIN = "text"
"""Neither code nor output: a formula, a layout of folders."""
EVERY_BLOCK = [block for page in PAGES for block in blocks(page)]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

RECIPE = """
import torch
from bilevel import Engine, Problem


class Outer(Problem):
    def loss(self, batch):
        return (self.inner.module.weight - 1.0).square().sum()


class Inner(Problem):
    def loss(self, batch):
        return (self.module.weight - self.outer.module.weight).square().sum() / 2


def build(config):
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)
    problems = [kind(torch.nn.Linear(2, 1, bias=False), optimizer=sgd) for kind in (Outer, Inner)]
    return Engine(problems, config.engine, hypergradient=config.hypergradient)
"""
# Later options count: these come after those of a page.
TINY = {
    "bilevel": ["--steps", "2", "--set", "engine.progress=false"],
    "bidora": [
        *("--max-rows", "12", "--max-length", "8", "--steps", "2", "--search-steps", "2", "--batch-size", "4"),
        "--overwrite",
    ],
}


# What there is on every page


def command_lines(text: str) -> list[str]:
    """Returns the commands of a block, without comments, prompts and line ends."""
    lines = text.replace("\\\n", " ").splitlines()
    found = (shlex.join(shlex.split(line.removeprefix("$ "), comments=True)) for line in lines)
    return [line for line in found if line]


def is_command_block(block: Block) -> bool:
    if block.language in COMMANDS:
        return True
    first = block.text.split(maxsplit=1)[:1]
    return block.language == INDENTED and bool(first) and (first[0] in RUNNERS or first[0] in ("python", "pip", "$"))


def followed_by_output(block: Block) -> str | None:
    """Returns what the page says that a block prints, or None."""
    place = EVERY_BLOCK.index(block) + 1
    following = EVERY_BLOCK[place] if place < len(EVERY_BLOCK) else None
    if following is None or following.page != block.page or following.language != OUTPUT:
        return None
    return following.text


def problem_with(block: Block, before: Block | None) -> str:
    """Returns why a block would go unnoticed by the tests below; empty where it is covered."""
    if block.language == OUTPUT:
        if before is None or not (before.language in PYTHON or is_command_block(before)):
            return "output of nothing: the block before must be Python or commands"
        return ""
    if is_command_block(block) or block.language in (*PYTHON, *SETTINGS):
        return ""
    if block.language not in (PLAIN, INDENTED):
        known = ", ".join((*PYTHON, *COMMANDS, *SETTINGS, OUTPUT, PLAIN))
        return f"fence {block.language!r} is none of {known}"
    for line in block.text.splitlines():
        if re.match(r"\s*(\$ |>>> |import \w|from \w+ import|def \w+\(|class \w+[:(])", line):
            return f"{line.strip()!r} is code, and would not be executed: name its language"
        words = line.split()
        if words and words[0] in RUNNERS:
            return f"{line.strip()!r} is a command, and would not be executed: name its language"
    return ""


def uncovered(found: list[Block]) -> list[str]:
    pairs = zip([None, *found], found, strict=False)
    troubles = ((block, problem_with(block, before)) for before, block in pairs)
    return [f"{block.where}: {trouble}" for block, trouble in troubles if trouble]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_is_passed_over(page: Path) -> None:
    assert uncovered(blocks(page)) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("```ruby\nputs 1\n```\n", "fence 'ruby'"),
        ("```\nx = 1\n```\n", "fence ''"),
        ("```output\n1\n```\n", "output of nothing"),
        ("```text\nimport torch\n```\n", "is code"),
        ("```text\nbilevel methods\n```\n", "is a command"),
        ("Formula:\n\n    def f(x):\n        return x\n", "is code"),
        ("Then:\n\n    a = b\n    make test\n", "is a command"),
    ],
)
def test_what_nothing_executes_is_an_error(text: str, says: str) -> None:
    page = PAGES[0].with_name("page.md")
    assert [line for line in uncovered(blocks(page, text)) if says in line]


def test_lists_and_directives_are_no_blocks_and_fences_in_them_are() -> None:
    text = "::: bilevel.X\n    options:\n\n- a\n\n    more of it\n\n    ```python\n    if x:\n        y = 2\n    ```\n"
    found = blocks(PAGES[0].with_name("page.md"), text)
    assert [(block.language, block.text, block.line) for block in found] == [("python", "if x:\n    y = 2\n", 8)]


def test_there_are_examples() -> None:
    kinds = [block.language for block in EVERY_BLOCK]
    assert kinds.count("python") >= 20
    assert sum(is_command_block(block) for block in EVERY_BLOCK) >= 5


# Python


def fine_tuning() -> dict[str, object]:
    """What the pages' readers have at hand: a model, tokenised data and a collator."""
    from transformers import BertConfig, BertForSequenceClassification, default_data_collator

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=8, **sizes))
    rows = [{"input_ids": [1 + place % 2, 5, 6], "labels": place % 2} for place in range(20)]
    return {"model": model, "train": rows, "validation": rows, "collator": default_data_collator}


@contextlib.contextmanager
def tolerant() -> Iterator[None]:
    """Within, warnings of other libraries that a reader would see too are no errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*pin_memory.*")  # Trainer's default, on a machine without GPU
        yield


def printed(code: str, names: dict[str, object], *, may_raise: bool) -> str:
    """Executes code and returns what it prints, with the line of an error that it may raise at the end."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), tolerant():
        try:
            exec(compile(code, "example", "exec"), names)
        except Exception as error:
            if not may_raise:
                raise
            stream.write(f"{type(error).__name__}: {error}\n")
    return stream.getvalue()


def same_output(expected: str, got: str) -> bool:
    """Compares but for white space, so that long lines can be broken; ``...`` stands for anything."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(" ".join(expected.split()), " ".join(got.split()), flags)


@pytest.mark.parametrize(
    "block", [pytest.param(block, id=block.where) for block in EVERY_BLOCK if block.language in PYTHON]
)
def test_python(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    if "from bidora" in block.text:
        names.update(fine_tuning())
    expected = followed_by_output(block)
    may_raise = expected is not None and bool(re.match(r"\w+(Error|Interrupt|Exception): ", last_paragraph(expected)))
    got = printed(block.text, names, may_raise=may_raise)
    if expected is not None:
        assert same_output(expected, got), f"the page says\n{expected}\nand the block printed\n{got}"


def last_paragraph(text: str) -> str:
    """Returns the end of an output from the line that names an error, if there is one."""
    lines = text.splitlines()
    starts = [place for place, line in enumerate(lines) if re.match(r"\w+(Error|Interrupt|Exception): ", line)]
    return "\n".join(lines[starts[-1] :]) if starts else ""


def test_output_is_compared() -> None:
    assert same_output("a line that was\nbroken ... 3.", "a line that was broken after 2, before 3.\n")
    assert not same_output("3", "4\n")
    raised = printed("print(1)\nraise ValueError('x')", {}, may_raise=True)
    assert raised == "1\nValueError: x\n"
    assert last_paragraph(raised) == "ValueError: x"
    with pytest.raises(ValueError, match="x"):
        printed("raise ValueError('x')", {}, may_raise=False)


# Settings


def check_settings(block: Block, run: RunConfig | None = None) -> None:
    """Loads settings as the program does whose they are.

    A comment in the first line says whose: ``# pyproject.toml …``, ``# … bidora train …``, or else those of a run.
    Where it names a recipe, ``# bilevel run examples/NAME.py …``, its section ``recipe`` is checked too.
    """
    first = block.text.splitlines()[0]
    parse: Callable[[str], object] = {"toml": tomllib.loads, "yaml": yaml.safe_load, "json": json.loads}[block.language]
    tree = parse(block.text)
    assert isinstance(tree, dict)
    if "pyproject.toml" in first:
        assert set(tree) <= {"project", "build-system", "tool"}
        for group in tree.get("project", {}).get("entry-points", {}):
            assert group in PROJECT["project"]["entry-points"], f"{group} is no group of entry points"
    elif "bidora" in first:
        load_config(tree, schema=TrainSettings)
    elif recipe := re.search(r"examples/\w+\.py", first):
        from bilevel.recipe import load_recipe

        made = load_recipe(ROOT / recipe[0])
        load_config(tree, schema=made.schema, defaults=made.defaults)
    else:
        load_config(tree)


@pytest.mark.parametrize(
    "block", [pytest.param(block, id=block.where) for block in EVERY_BLOCK if block.language in SETTINGS]
)
def test_settings(block: Block) -> None:
    check_settings(block)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("toml", "[engine]\nstep = 3\n"),
        ("yaml", "hypergradient: neuman\n"),
        ("json", '{"hypergradient": {"method": "neumann", "term": 1}}'),
        ("toml", "# settings of bidora train\nrnk = 4\n"),
        ("toml", '# pyproject.toml\n[project.entry-points."bilevel.method"]\nx = "y:z"\n'),
        ("toml", "# bilevel run examples/hyper_cleaning.py\n[recipe]\nnum_trusty = 4\n"),
    ],
)
def test_misspelt_settings_are_noticed(language: str, text: str) -> None:
    with pytest.raises((ValueError, AssertionError)):
        check_settings(Block(PAGES[0], 1, language, text))


# Commands


def run_make(words: list[str]) -> None:
    targets = {name for line in re.findall(r"^([\w .-]+):(?!=)", MAKEFILE, re.M) for name in line.split()}
    variables = set(re.findall(r"^(\w+)\s*\?=|\$\((\w+)\)", MAKEFILE, re.M))
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert name in ({part for pair in variables for part in pair} if is_variable else targets), (
            f"the Makefile has no {name}"
        )


def run_pip(words: list[str]) -> None:
    assert words[0] == "install", f"pip {words[0]}: what should the test do?"
    extras = PROJECT["project"]["optional-dependencies"]
    options = {"-e", "--editable", "-U", "--upgrade", "-q", "--quiet", "--no-deps", "--ignore-requires-python"}
    for word in words[1:]:
        if word.startswith("-"):
            assert word in options, f"pip install {word}: is there such an option?"
            continue
        wanted = Requirement(word.replace(".", "bilevel", 1) if re.match(r"\.(\[|$)", word) else word)
        if wanted.name == "bilevel":
            assert wanted.extras <= set(extras), f"{word}: the extras are {sorted(extras)}"


def run_program(name: str, main: Callable[[list[str]], None], words: list[str], *, as_it_stands: bool) -> None:
    """Runs one of our programs, with a budget of two steps, and files of the reader's own made up."""
    words = list(words)
    for place, word in enumerate(words):
        if word == "RECIPE.py":
            Path(word).write_text(RECIPE, encoding="utf-8")
        elif place and words[place - 1] == "--model" and not Path(word).exists():
            words[place] = TrainSettings().model
        elif place and words[place - 1] == "--data" and word.endswith(".csv") and not Path(word).exists():
            rows = "".join(f"{('good', 'bad')[k % 2]} text {k},{k % 2}\n" for k in range(60))
            Path(word).write_text(f"text,label\n{rows}", encoding="utf-8")
    if not as_it_stands and words[:1] in (["run"], ["train"]):
        words += TINY[name]
    allowed = (0, 1) if words[:1] == ["check"] else (0,)  # 1: the report says that the method is not exact
    try:
        main(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    assert code in allowed, f"{name} {shlex.join(words)} ended with {code}"


def run_bilevel(words: list[str], *, as_it_stands: bool = False) -> None:
    run_program("bilevel", bilevel.cli.main, words, as_it_stands=as_it_stands)


def run_bidora(words: list[str], *, as_it_stands: bool = False) -> None:
    run_program("bidora", bidora.cli.main, words, as_it_stands=as_it_stands)


def run_python(words: list[str]) -> None:
    """Asks a program of this repository for its help, and whether it knows the options."""
    if words[:2] == ["-m", "pip"]:
        return run_pip(words[2:])
    module = words[0] == "-m"
    program, options = (words[1], words[2:]) if module else (words[0], words[1:])
    stream = io.StringIO()
    before = sys.argv, list(sys.path)
    sys.argv = [program, "--help"]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(stream):
            # Another test may have imported the module; its help is the same a second time.
            warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
            with pytest.raises(SystemExit) as end:
                (runpy.run_module if module else runpy.run_path)(program, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before
    assert end.value.code in (0, None)
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", stream.getvalue()))
    unknown = [word for word in options if word.startswith("-") and word.split("=")[0] not in known]
    assert not unknown, f"{program} has no {unknown}"
    return None


RUNNERS: dict[str, Callable[[list[str]], None]] = {
    "make": run_make,
    "pip": run_pip,
    "bilevel": run_bilevel,
    "bidora": run_bidora,
    "python": run_python,
}


def run_commands(block: Block, expected: str | None) -> None:
    """Runs the commands of a block in the present folder."""
    stream = io.StringIO()
    for line in command_lines(block.text):
        program, *words = shlex.split(line)
        assert program in RUNNERS, f"{block.where}: teach this test what to do with {program!r}"
        runner = RUNNERS[program]
        with contextlib.redirect_stdout(stream), tolerant():
            warnings.simplefilter("ignore", BilevelWarning)  # two steps solve nothing
            if expected is not None and program in TINY:
                runner(words, as_it_stands=True)  # type: ignore[call-arg]
            else:
                runner(words)
    if expected is not None:
        got = stream.getvalue()
        assert same_output(expected, got), f"the page says\n{expected}\nand the commands printed\n{got}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.page == page and is_command_block(b) for b in EVERY_BLOCK)], ids=name_of
)
def test_commands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("examples", "benchmarks", "docs"):
        Path(name).symlink_to(ROOT / name)
    for block in (block for block in EVERY_BLOCK if block.page == page):
        if is_command_block(block):
            run_commands(block, followed_by_output(block))
        elif block.language not in (None, OUTPUT) and (named := re.match(r"# (\w+\.(toml|yaml|json|py))", block.text)):
            Path(named[1]).write_text(block.text, encoding="utf-8")


@pytest.mark.parametrize(
    "line",
    [
        "make tset",
        "make test VENVS=x",
        "pip install 'bilevel[plots]'",
        "pip install --no-dep bilevel",
        "pip wheel .",
        "bilevel method",
        "bilevel methods neuman",
        "bilevel run RECIPE.py --sets engine.steps=1",
        "bilevel run examples/no_such.py",
        "bidora trian",
        "python -m benchmarks.reproduction --quik",
        "python benchmarks/no_such.py",
        "python -m benchmarks.no_such",
        "sudo make test",
    ],
)
def test_a_wrong_command_is_noticed(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    with pytest.raises((AssertionError, OSError, ImportError)):
        run_commands(Block(PAGES[0], 1, "bash", f"{line}\n"), None)


def test_commands_are_read_as_a_shell_reads_them() -> None:
    text = "# a comment\n$ bilevel run x.py \\\n    --set a='b c'  # why\n\nmake test\n"
    assert command_lines(text) == ["bilevel run x.py --set 'a=b c'", "make test"]


# Pages of names


def fragments() -> Iterator[tuple[str, str]]:
    """Yields the examples in docstrings that are no doctests (those run by themselves), by the name of their owner."""
    for module in (bilevel, bidora, bilevel.callbacks, bilevel.problems, bilevel.single_loop):
        for name in module.__all__:
            found = getattr(module, name)
            members = {f".{key}": part for key, part in vars(found).items()} if inspect.isclass(found) else {}
            for key, part in {"": found, **members}.items():
                text = (inspect.getdoc(part) if callable(part) else None) or ""
                for code in re.findall(r"::\n\n((?:    .*\n|\n)+)", f"{text}\n"):
                    if re.search(r"^    (?:class \w+.*:|\w+ = \w+\(|\w+\()", code, re.M):
                        yield f"{module.__name__}.{name}{key}", textwrap.dedent(code)


def at_hand(*, images: bool) -> dict[str, object]:
    """What a fragment may use without saying where it comes from: this library's names, and a user's usual things."""
    torch.manual_seed(0)
    digits = [(torch.rand(8, 64), torch.arange(8) % 10)]
    names: dict[str, object] = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    for module in (bilevel.callbacks, bilevel.problems, bilevel):
        names |= {name: getattr(module, name) for name in module.__all__}
    shown = [(x.reshape(8, 1, 8, 8), y) for x, y in digits] if images else digits
    names |= dict.fromkeys(("train", "training", "validation", "loader"), shown)
    names["sgd"] = sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    names["model"] = torch.nn.Sequential(torch.nn.Linear(64, 10))
    names["network"] = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    # Within a method there is a problem, in an engine with another one.
    decay = WeightDecay(model := torch.nn.Linear(64, 10))
    names["self"] = outer = Hyperparameters({"decay": decay}, optimizer=sgd, data=digits)
    Engine([outer, Tuned(model, optimizer=sgd, data=digits)], EngineConfig(progress=False))
    return names


@pytest.mark.parametrize(("owner", "code"), [pytest.param(*found, id=found[0]) for found in fragments()])
def test_docstring(owner: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = re.sub(r"EngineConfig\(steps=\d+\)", "EngineConfig(steps=2, progress=False)", code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BilevelWarning)  # of what two steps leave unsolved
        printed(short, at_hand(images="Conv2d" in code), may_raise=False)


# The README


def test_the_readme_s_example_finds_a_weight_decay_near_the_best():
    block = next(block.text for block in EVERY_BLOCK if "class Decay" in block.text)
    names: dict[str, object] = {}
    exec(
        compile(block.replace("EngineConfig(steps=50)", "EngineConfig(steps=50, progress=False)"), "example", "exec"),
        names,
    )
    engine = names["engine"]
    x, y, val_x, val_y = names["x"][:200], names["y"][:200], names["x"][200:], names["y"][200:]

    def validation_loss(decay: float) -> float:
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 10)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y) + decay * model.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return torch.nn.functional.cross_entropy(model(val_x), val_y).item()

    best = min(validation_loss(torch.tensor(float(power)).exp().item()) for power in range(-12, 1))
    found = validation_loss(engine.problems["decay"].module[0].exp().item())
    assert found < 1.1 * best
    assert found < 0.5 * validation_loss(1.0)  # where it started
