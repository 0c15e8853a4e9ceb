from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.integration import warm

from paigeant import host
from paigeant.cli import main
from paigeant.demo.play import DOCUMENT
from paigeant.demo.text import read_document, sentences

COMMAND = [sys.executable, "-m", "paigeant.cli", "demo"]
SHORT = "# A note\n\nThe ferry leaves at nine from the north pier.\n\n## Weather\n\nStrong wind is expected by noon.\n"


@dataclass(frozen=True)
class Shown:
    """What a call of `paigeant demo` did: its exit code, what it wrote, and the folder it was called in."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def run(self) -> str:
        """The id of its run."""
        found = re.search(r"demo-[0-9a-f]{6}", self.out)
        assert found is not None, self.out + self.err
        return found[0]

    def journal(self) -> list[dict[str, Any]]:
        """What its steps wrote when they began, and its agents when they made a call."""
        text = (self.folder / "demo-journal.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def began(self) -> list[dict[str, Any]]:
        """The steps alone."""
        return [entry for entry in self.journal() if entry["call"] is None]

    def calls(self, call: str) -> list[dict[str, Any]]:
        """The calls of models or tools alone."""
        return [entry for entry in self.journal() if entry["call"] == call]

    def record(self) -> dict[str, Any]:
        """The run as the command line shows it, with what its agents used."""
        return json.loads(called(self.folder, "runs", "show", self.run, "--json").stdout)


def environment(**more: str) -> dict[str, str]:
    """This environment without settings and keys of whoever runs the tests."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PAIGEANT_", "OPENAI_"))
    }
    return {**kept, "COLUMNS": "200", **more}


def called(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Another command of the program, in a folder."""
    return warm.run(*arguments, folder=folder, environment=environment())


def show(folder: Path, *arguments: str, **more: str) -> Shown:
    """`paigeant demo` with these arguments, called in `folder`."""
    done = warm.run("demo", *arguments, folder=folder, environment=environment(**more))
    return Shown(done.returncode, done.stdout, done.stderr, folder)


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Shown]:
    """Calls `paigeant demo` in this process and in an empty folder: for what ends before a worker is started."""
    for name in os.environ:
        if name.startswith(("PAIGEANT_", "OPENAI_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Shown:
        monkeypatch.setattr(sys, "argv", ["paigeant", "demo", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Shown(int(ended.value.code or 0), captured.out, captured.err, tmp_path)

    return call


def until(holds: Callable[[], bool]) -> None:
    """Return once `holds` is true. The test's own time limit ends what never is."""
    while not holds():
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    return host.is_gone(f"{pid}@")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """The demonstration with nothing asked for, as `make demo` shows it: with an interpreter of its own."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(COMMAND, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    return Shown(done.returncode, done.stdout, done.stderr, folder)


def test_it_ends_well(shown: Shown) -> None:
    """The demonstration needs no key and no server, and exits with 0."""
    assert (shown.code, shown.err) == (0, "")


def test_the_worker_is_killed_in_the_middle(shown: Shown) -> None:
    """The first process is killed while an agent was at its step; a second one goes on with it."""
    began = [(entry["step"], entry["pid"]) for entry in shown.began()]
    first, second = began[0][1], began[-1][1]
    assert first != second
    assert [step for step, pid in began if pid == first] == ["read", "outline"]
    assert [step for step, pid in began if pid == second] == [
        "outline",
        "brief",
        "review",
        "review.1",
        "write",
    ]


def test_the_agent_goes_on_behind_the_last_recorded_call(shown: Shown) -> None:
    """By the journal, no model call that the dead worker made was made again, and only the tool call it died in."""
    killed = shown.journal()[0]["pid"]
    made = {call: [entry["key"] for entry in shown.calls(call)] for call in ("model", "tool")}
    dead = {
        call: [entry["key"] for entry in shown.calls(call) if entry["pid"] == killed]
        for call in ("model", "tool")
    }
    assert {call: len(keys) for call, keys in dead.items()} == {"model": 5, "tool": 5}
    assert len(set(made["model"])) == len(made["model"])
    assert [key for key, count in Counter(made["tool"]).items() if count > 1] == [dead["tool"][-1]]


def test_it_says_how_many_calls_were_saved(shown: Shown) -> None:
    """The numbers on the screen are those of the journal and of the engine's records, which are kept apart."""
    document = read_document(DOCUMENT.read_text(encoding="utf-8"), name="document")
    step = next(step for step in shown.record()["steps"] if step["id"] == "outline")
    used = step["usage"]["requests"], step["usage"]["tool_calls"]
    assert used == (len(document.sections) + 1, len(document.sections))
    second = shown.journal()[-1]["pid"]
    later = {
        call: sum(entry["pid"] == second and entry["step"] == "outline" for entry in shown.calls(call))
        for call in ("model", "tool")
    }
    model, tool = used[0] - later["model"], used[1] - later["tool"]
    assert (model, tool) == (5, 4)
    assert f"recorded by then: read; of outline {model} model calls and {tool} tool calls\n" in shown.out
    assert f"saved  {model} model calls and {tool} tool calls, answered from the record" in shown.out
    made = len(shown.calls("model")), len(shown.calls("tool"))
    assert f"made   {made[0]} model calls and {made[1]} tool calls in all\n" in shown.out
    assert "recorded calls that were made again: 0\n" in shown.out


def test_the_readme_shows_what_it_says(shown: Shown) -> None:
    """The lines that README.md prints of it are its own."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    printed = text.partition("at the end stands what that saved:\n\n```\n")[2].partition("```")[0]
    assert "saved" in printed
    assert set(printed.splitlines()) <= {line.strip() for line in shown.out.splitlines()}


def test_lines_fit_a_narrow_terminal(shown: Shown) -> None:
    """What happened and what came of it is told in lines of 80 columns at most, but for the folder that was chosen."""
    told = shown.out.partition("look further:")[0].splitlines()
    assert [line for line in told if len(line) > 80 and str(shown.folder) not in line] == []


def test_no_recorded_step_ran_twice(shown: Shown) -> None:
    """By the journal, which is none of the engine's records, only the step that was cut off began a second time."""
    assert Counter(entry["step"] for entry in shown.began()) == {
        "read": 1,
        "outline": 2,
        "brief": 1,
        "review": 1,
        "review.1": 1,
        "write": 1,
    }
    assert "recorded steps that ran twice: 0\n" in shown.out


def test_the_record_agrees_with_the_journal(shown: Shown) -> None:
    """Attempts are recorded as they were made, and the run is completed."""
    record = shown.record()
    attempts = {step["id"]: step["attempts"] for step in record["steps"]}
    assert record["status"] == "completed"
    assert attempts == Counter(entry["step"] for entry in shown.began())


def test_the_reviewer_inserted_a_step(shown: Shown) -> None:
    """The brief of the document that ships is too long, so that the reviewer's tool has it shortened."""
    steps = {step["id"]: step for step in shown.record()["steps"]}
    assert steps["review.1"]["activity"] == "shorten"
    assert steps["review"]["output"]["verdict"] == "too long"
    assert steps["brief"]["output"]["words"] > 200 >= steps["review.1"]["output"]["words"]


def test_the_brief_quotes_the_document(shown: Shown) -> None:
    """The brief is made of the document's own sentences, and of no more words than were allowed."""
    document = read_document(DOCUMENT.read_text(encoding="utf-8"), name="document")
    own = {sentence for section in document.sections for sentence in sentences(section.text)}
    output = next(step["output"] for step in shown.record()["steps"] if step["id"] == "review.1")
    quoted = [output["lead"], *(sentence for text in output["paragraphs"] for sentence in sentences(text))]
    assert set(quoted) <= own
    brief = (shown.folder / "brief.md").read_text(encoding="utf-8")
    assert all(sentence in brief for sentence in quoted)
    assert "by the model offline-extractive" in brief


def test_it_says_that_the_model_is_offline(shown: Shown) -> None:
    """Nobody takes the offline model for a language model."""
    assert "offline and without a key: it picks the most telling sentences" in shown.out


def test_it_tells_what_happens_line_by_line(shown: Shown) -> None:
    """Where there is no terminal, each event is a line: steps, the kill, the recovery, the revision."""
    told = [line.split(" s  ", 1)[1] for line in shown.out.splitlines() if " s  " in line]
    expected = [
        r"worker A started",
        r"step read: completed .* by worker A, attempt 1",
        r"SIGKILL: worker A is dead, in the middle of outline, in a tool call",
        r"recorded by then: read; of outline 5 model calls",
        r"worker B started",
        r"worker B took over: outline goes on behind these calls",
        r"step outline: completed .* by worker B, attempt 2",
        r"review revised the itinerary: shorten inserted as step review.1",
        r"step write: completed",
    ]
    places = [next(n for n, line in enumerate(told) if re.match(pattern, line)) for pattern in expected]
    assert places == sorted(places)


def test_the_commands_that_it_names_work(shown: Shown) -> None:
    """Each command at the end can be pasted into a shell as it is."""
    lines = shown.out.partition("look further:\n")[2].strip().splitlines()
    script = "set -e\n" + "\n".join(line.strip() for line in lines)
    done = subprocess.run(
        ["sh", "-c", script], cwd="/", env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(shown.run) >= 2


def test_no_process_is_left(shown: Shown) -> None:
    """Both workers are gone when the demonstration is over."""
    assert all(gone(entry["pid"]) for entry in shown.journal())


def test_a_brief_that_fits_is_not_shortened(tmp_path: Path) -> None:
    """With a short file the reviewer lets the brief pass, and no step is inserted."""
    (tmp_path / "note.txt").write_text(SHORT, encoding="utf-8")
    shown = show(tmp_path, "note.txt", "--no-kill")
    steps = {step["id"]: step for step in shown.record()["steps"]}
    assert list(steps) == ["read", "outline", "brief", "review", "write"]
    assert steps["review"]["output"]["verdict"] == "fits"


def test_nobody_is_killed_with_no_kill(tmp_path: Path) -> None:
    """With --no-kill one worker does all steps, each once, in a folder that is made."""
    (tmp_path / "note.md").write_text(SHORT, encoding="utf-8")
    shown = show(tmp_path, "note.md", "--no-kill", "--out", "made/here")
    assert (shown.code, shown.err) == (0, "")
    assert "SIGKILL" not in shown.out
    assert "saved" not in shown.out
    made = Shown(shown.code, shown.out, shown.err, tmp_path / "made/here")
    assert len({entry["pid"] for entry in made.journal()}) == 1
    assert len(made.began()) == 5


def test_another_model_can_do_it(tmp_path: Path) -> None:
    """--model takes any model of pydantic-ai's; its test model calls every tool, so that the brief is shortened."""
    (tmp_path / "note.md").write_text(SHORT, encoding="utf-8")
    shown = show(tmp_path, "note.md", "--no-kill", "--model", "test")
    assert (shown.code, shown.err) == (0, "")
    assert "review.1" in shown.out
    assert "by the model test" in (tmp_path / "brief.md").read_text(encoding="utf-8")


def test_a_model_that_reads_little_is_cut_off_later(tmp_path: Path) -> None:
    """Where a model doesn't read to the middle of the document the worker is killed as the next step begins."""
    shown = show(tmp_path, "--model", "test")
    assert (shown.code, shown.err) == (0, "")
    assert Counter(entry["step"] for entry in shown.began())["brief"] == 2
    assert "in the middle of brief\n" in shown.out
    assert "recorded by then: read, outline\n" in shown.out
    assert "worker B took over: brief begins again, what was recorded does not\n" in shown.out


def test_a_document_with_many_sections_is_read_several_at_a_time(tmp_path: Path) -> None:
    """However many there are, the agent stays far below the requests that it may make."""
    text = "\n".join(f"## Part {number}\n\nPump {number} has a valve.\n" for number in range(70))
    (tmp_path / "long.md").write_text(text, encoding="utf-8")
    shown = show(tmp_path, "long.md", "--no-kill")
    outline = next(step["output"] for step in shown.record()["steps"] if step["id"] == "outline")
    assert len(outline["points"]) == 70
    assert sum(entry["step"] == "outline" for entry in shown.calls("model")) == 13


def test_a_model_that_fails_is_exit_code_1(tmp_path: Path) -> None:
    """When the model can't be reached the run fails, and the demonstration says why."""
    more = {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "PAIGEANT_RETRIES": "0"}
    shown = show(tmp_path, "--model", "openai:gpt-5-mini", **more)
    assert (shown.code, shown.err) == (1, "")
    assert re.search(r"error +outline: .*Connection error", shown.out)
    assert not (tmp_path / "brief.md").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "can't read file.md: No such file or directory"),
        (b"", "file.md holds no sentences"),
        (b"# Only\n\n## Headings\n", "file.md holds no sentences"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "file.md is not a text in UTF-8"),
        (b"abc\x00def. Ghi.", "file.md is a binary file"),
        ("Grüße aus Köln.".encode("latin-1"), "file.md is not a text in UTF-8"),
    ],
)
def test_a_file_that_is_no_text_is_one_line(
    tmp_path: Path, refused: Callable[..., Shown], content: bytes | None, expected: str
) -> None:
    """A file that can't be summarised is exit code 2 and one line that names it; nothing is begun."""
    if content is not None:
        (tmp_path / "file.md").write_bytes(content)
    shown = refused("file.md")
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith(f"error: {expected}")
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "paigeant.db").exists()


def test_a_folder_is_no_file(tmp_path: Path, refused: Callable[..., Shown]) -> None:
    """A folder in place of a file is exit code 2."""
    shown = refused(str(tmp_path))
    assert (shown.code, shown.err) == (
        2,
        f"error: {tmp_path} is a folder; expected a text or Markdown file\n",
    )


@pytest.mark.parametrize("model", ["nobody:nothing", "gpt", "openai:gpt-5-mini"])
def test_a_model_that_can_not_be_is_one_line(refused: Callable[..., Shown], model: str) -> None:
    """An unknown model, or one whose key is missing, is exit code 2 before anything is begun."""
    shown = refused("--model", model)
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith(f"error: --model {model}: ")
    assert shown.err.count("\n") == 1


def test_a_brief_of_somebody_else_is_not_overwritten(tmp_path: Path, refused: Callable[..., Shown]) -> None:
    """A brief.md that the demonstration didn't write stays as it is."""
    (tmp_path / "brief.md").write_text("mine", encoding="utf-8")
    shown = refused()
    assert (shown.code, shown.out) == (2, "")
    assert "choose another folder with --out" in shown.err
    assert (tmp_path / "brief.md").read_text(encoding="utf-8") == "mine"


def test_an_output_folder_that_can_not_be_is_one_line(tmp_path: Path, refused: Callable[..., Shown]) -> None:
    """A folder that can't be made is exit code 2."""
    (tmp_path / "file").touch()
    shown = refused("--out", "file/folder")
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith("error: can't write into the folder file/folder: ")


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A demonstration whose first worker is in the middle of its first step, and the process of that worker."""
    journal = tmp_path / "demo-journal.jsonl"
    with subprocess.Popen(
        [*COMMAND, "--pace", "30"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until(
            lambda: (
                process.poll() is not None
                or (journal.exists() and "\n" in journal.read_text(encoding="utf-8"))
            )
        )
        yield process, json.loads(journal.read_text(encoding="utf-8"))["pid"]
        process.kill()


def test_ctrl_c_ends_it_with_its_worker(begun: tuple[subprocess.Popen[str], int]) -> None:
    """An interrupt ends the demonstration with exit code 130, without a traceback, and its worker with it."""
    process, worker = begun
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, "Traceback" in err) == (130, False)
    assert gone(worker)


def test_a_worker_does_not_outlive_the_demonstration(begun: tuple[subprocess.Popen[str], int]) -> None:
    """When the demonstration itself is killed, its worker finds out and ends."""
    process, worker = begun
    process.kill()
    until(lambda: gone(worker))


def test_a_terminal_shows_a_table(tmp_path: Path) -> None:
    """On a terminal the steps are a table that is drawn again and again, with attempts and workers."""
    (tmp_path / "note.md").write_text(SHORT, encoding="utf-8")
    ours, theirs = pty.openpty()
    more = {"TERM": "xterm", "COLUMNS": "80", "LINES": "50", "NO_COLOR": "1"}
    with subprocess.Popen(
        [*COMMAND, "note.md", "--pace", "0"],
        cwd=tmp_path,
        env=environment(**more),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        text = _all_of(ours)
    os.close(ours)
    assert process.returncode == 0
    assert "\x1b[" in text
    final = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.rpartition("step ")[2])
    assert re.search(r"✔ +outline +outline +agent +completed +2 +3 +[0-9.]+ s +B", final)


def _all_of(terminal: int) -> str:
    found = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            piece = b""
        if not piece:
            return found.decode()
        found += piece
