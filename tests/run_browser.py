"""Notebooks in JupyterLab, in headless Chromium: run them, move their sliders, answer their questions.

    make test-browser

The notebooks are copies in build/browser/course, run in the smoke profile. Pictures of every widget are kept in
build/browser for a person to look at, and with them the server's log. Chromium is looked for on this machine; CHROMIUM
names another one.
"""

import ast
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
FOLDER = REPO / "build" / "browser"
# An ordering, a slider, a live curve, and quizzes everywhere.
NOTEBOOKS = [n for n in ("00_start_here", "04_adapters", "05_lora", "07_nf4", "12_choosing")
             if (REPO / "notebooks" / f"{n}.ipynb").exists()]  # fmt: skip
SECONDS = 900  # a notebook may take, on a busy machine
WAIT = 60_000  # milliseconds for one thing to happen on the page
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome",
            "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")  # fmt: skip
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def find_browser(playwright) -> str | None:
    """The Chromium to use: of CHROMIUM, on the path, or the one that playwright has downloaded."""
    for name in (os.environ.get("CHROMIUM"), *BROWSERS, playwright.chromium.executable_path):
        if name and (found := shutil.which(name)):
            return found
    return None


def missing(what: str) -> None:
    """No test has failed, and none has run: exit status 2."""
    pytest.exit(what, returncode=2)


class Server:
    """A JupyterLab of this Python on a free port, with a token and settings of its own."""

    def __init__(self):
        shutil.rmtree(FOLDER, ignore_errors=True)
        course, settings = FOLDER / "course", FOLDER / "settings"
        course.mkdir(parents=True)
        for name in NOTEBOOKS:
            shutil.copy(REPO / "notebooks" / f"{name}.ipynb", course)
        quiet = settings / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
        quiet.parent.mkdir(parents=True)  # no question whether to fetch news, no look for updates
        quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.token = secrets.token_hex(16)
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = FOLDER / "server.log"
        environment = os.environ | {
            "JUPYTER_TOKEN": self.token, "MINIPEFT_PROFILE": "smoke", "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            "JUPYTER_CONFIG_DIR": str(FOLDER / "config"), "JUPYTER_DATA_DIR": str(FOLDER / "data"),
            "JUPYTER_RUNTIME_DIR": str(FOLDER / "runtime"), "IPYTHONDIR": str(FOLDER / "ipython"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")])),
        }  # fmt: skip
        command = [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={self.port}",
            "--ServerApp.port_retries=0", f"--ServerApp.root_dir={course}", f"--LabApp.user_settings_dir={settings}",
            f"--LabApp.workspaces_dir={FOLDER / 'workspaces'}", "--LabApp.expose_app_in_browser=True",
            # should this process be killed: the kernels and then the server stop by themselves
            "--MappingKernelManager.cull_idle_timeout=600", "--MappingKernelManager.cull_connected=True",
            "--ServerApp.shutdown_no_activity_timeout=600",
        ]  # fmt: skip
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--allow-root")
        self.process = subprocess.Popen(
            command, env=environment, stdout=self.log.open("w"), stderr=subprocess.STDOUT, start_new_session=True
        )

    def ask(self, path: str, method: str = "GET"):
        request = urllib.request.Request(self.address + path, method=method, headers={"Authorization": f"token {self.token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or "null")

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                return self.ask("/api/status")
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        raise AssertionError(f"JupyterLab does not answer:\n{self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def stop_kernels(self) -> None:
        for session in self.ask("/api/sessions"):
            self.ask(f"/api/sessions/{session['id']}", "DELETE")

    def stop(self) -> None:
        """The server and all its kernels."""
        try:
            self.stop_kernels()
        except (urllib.error.URLError, OSError):
            pass  # it is gone already
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, how)
                self.process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


@pytest.fixture(scope="session")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing('playwright is not here. Run `make test-browser`, or: pip install -c constraints.txt -e ".[browser]"')
    with sync_playwright() as playwright:
        path = find_browser(playwright)
        if path is None:
            missing(
                "no Chromium was found. On Debian and Ubuntu: apt install chromium. Elsewhere: "
                f"{sys.executable} -m playwright install chromium. Or name one: CHROMIUM=/path/to/chromium make test-browser"
            )
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)  # headless, with a new empty profile
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def server(browser):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then too
    server = Server()
    try:
        server.wait()
        yield server
    finally:
        server.stop()


# The notebook is shown, and its kernel has answered. Before that, Run asks for a kernel instead of running.
READY = """() => {
  const panel = window.jupyterapp?.shell.currentWidget;
  const kernel = panel?.sessionContext?.session?.kernel;
  return panel?.isRevealed && panel.sessionContext.isReady && kernel?.connectionStatus === 'connected' && kernel.status === 'idle';
}"""
# What the page's own model of the notebook says: a cell that is scrolled out of sight has no elements to look at.
STATE = """() => {
  const cells = window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === 'code');
  return cells.map(c => ({
    ran: c.model.executionCount !== null && c.model.executionState === 'idle',
    tags: c.model.getMetadata('tags') || [],
    source: c.model.sharedModel.getSource(),
    outputs: c.outputArea.model.toJSON(),
  }));
}"""
# Scrolls to the code cell of that number and waits for the notebook to attach it.
SHOW = """async number => {
  const notebook = window.jupyterapp.shell.currentWidget.content;
  const cells = notebook.widgets.filter(c => c.model.type === 'code');
  notebook.activeCellIndex = notebook.widgets.indexOf(cells[number]);
  await notebook.scrollToItem(notebook.activeCellIndex, 'start');
}"""
# What a picture shows, as text: equal pictures give equal texts.
PIXELS = """image => {
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  canvas.getContext('2d').drawImage(image, 0, 0);
  return image.complete && image.naturalWidth ? canvas.toDataURL() : '';
}"""


class Notebook:
    """One notebook in the browser."""

    def __init__(self, browser, server: Server, name: str):
        self.name, self.server = name, server
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.page.set_default_timeout(WAIT)
        self.said: list[str] = []  # the page's own errors
        self.page.on("pageerror", lambda error: self.said.append(f"page error: {error}"))
        self.page.on("console", lambda message: self.said.append(message.text) if message.type == "error" else None)
        self.page.goto(f"{server.address}/lab/tree/{name}.ipynb?reset&token={server.token}")
        self.page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=2 * WAIT)
        self.page.wait_for_function(READY, timeout=5 * WAIT)
        self.page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")

    def picture(self, what: str) -> Path:
        path = FOLDER / f"{self.name}-{what}.png"
        self.page.screenshot(path=path)
        return path

    def run_all(self) -> list[dict]:
        """Click Run, Run All Cells; the code cells when the last has run or one has failed."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name=re.compile(r"^Run All Cells$")).click()
        ends = time.monotonic() + SECONDS
        while time.monotonic() < ends:
            cells = self.page.evaluate(STATE)
            if all(cell["ran"] for cell in cells) or self.errors(cells):
                return cells
            time.sleep(1)
        waiting = next(cell["source"].splitlines()[0] for cell in cells if not cell["ran"])
        raise AssertionError(f"{self.name} was not through after {SECONDS} s; it waits at: {waiting}")

    @staticmethod
    def errors(cells: list[dict]) -> list[str]:
        return [f"{o['ename']}: {o['evalue']}" for cell in cells if "raises-exception" not in cell["tags"]
                for o in cell["outputs"] if o["output_type"] == "error"]  # fmt: skip

    def show(self, number: int):
        """Scroll to a code cell; its element."""
        self.page.evaluate(SHOW, number)
        cell = self.page.locator(".jp-CodeCell.jp-mod-active")
        cell.wait_for()
        return cell

    def close(self) -> None:
        self.page.close()
        self.server.stop_kernels()


@pytest.fixture
def notebook(browser, server, request):
    notebook = Notebook(browser, server, request.param)
    try:
        yield notebook
    finally:
        if request.session.testsfailed:
            notebook.picture("failed")
            print("\n".join([*notebook.said[-20:], "", "The server's last words:", server.tail()]))
        notebook.close()


def move(cell, slider, picture) -> None:
    """To the next value by the keyboard, to the first one with the mouse: the picture follows both times."""
    from playwright.sync_api import expect

    handle, readout = slider.locator(".noUi-handle"), slider.locator(".widget-readout")
    seen = [(readout.inner_text(), picture.evaluate(PIXELS))]
    assert seen[0][1]

    def follows():
        expect(readout).not_to_have_text(seen[-1][0])
        before = seen[-1][1]
        deadline = time.monotonic() + WAIT / 1000
        while picture.evaluate(PIXELS) in ("", before):
            assert time.monotonic() < deadline, f"the picture did not change at {readout.inner_text()}"
            time.sleep(0.1)
        seen.append((readout.inner_text(), picture.evaluate(PIXELS)))

    handle.focus()
    handle.press("ArrowRight")
    follows()
    at, rail = handle.bounding_box(), slider.locator(".noUi-base").bounding_box()
    page, middle = cell.page, at["y"] + at["height"] / 2
    page.mouse.move(at["x"] + at["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(rail["x"] + 1, middle, steps=8)
    page.mouse.up()
    follows()
    assert len({text for text, _ in seen}) == len({pixels for _, pixels in seen}) == 3


def answer(cell) -> None:
    """Every choice of the first question: each gets its verdict and reason, one is right; the score counts the first try."""
    from playwright.sync_api import expect

    question = cell.locator(".widget-vbox .widget-vbox").first
    buttons = question.locator("button[title^='Answer ']")
    verdict = question.locator(":scope > .widget-htmlmath").last
    said = []
    for i in range(buttons.count()):
        buttons.nth(i).click()
        expect(buttons.nth(i)).to_have_class(re.compile("mod-success|mod-warning"))
        expect(verdict).to_have_text(re.compile(r"^(Right|Not right)\.\s+\S"))
        if said:
            expect(verdict).not_to_have_text(said[-1])
        said.append(verdict.inner_text())
    assert len(said) >= 2 and len(set(said)) == len(said)
    assert sum(text.startswith("Right.") for text in said) == 1
    expect(cell.get_by_text(re.compile(r"^\d+ of \d+ right at the first try$")).first).to_be_visible()


def put_in_order(cell, source: str) -> None:
    """A part that does not belong is refused, then the parts in their order make the drawing."""
    from playwright.sync_api import expect

    from minipeft import lab
    from minipeft.lab.quizzes import LETTERS

    call = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "lab.ordering")
    asked = lab.ordering(*map(ast.literal_eval, call.args))
    letter = dict(zip(asked.offered, LETTERS))

    def button(part):
        return cell.locator(f"button[title='Part {letter[part]} is next']")

    button(next(iter(asked.decoys))).click()
    expect(cell.get_by_text("Not this one.")).to_be_visible()
    for part in asked.parts:
        button(part).click()
        expect(button(part)).to_be_disabled()
    expect(cell.get_by_text("with 1 wrong on the way")).to_be_visible()


def ask_for_a_method(cell) -> None:
    """Choose a goal, press the button: an answer appears."""
    from playwright.sync_api import expect

    cell.locator(".widget-dropdown").filter(has_text="goal").locator("select").select_option("classification")
    cell.get_by_role("button", name="Which method?").click()
    expect(cell.locator(".widget-html-content").last).to_have_text(re.compile(r"\w.{40}", re.DOTALL))


WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.mark.parametrize("notebook", NOTEBOOKS, indirect=True)
def test_a_notebook_runs_and_its_widgets_answer(notebook):
    cells = notebook.run_all()
    assert not notebook.errors(cells)
    moved = answered = 0
    for number, cell in enumerate(cells):
        if not any(WIDGET in output.get("data", {}) for output in cell["outputs"]):
            continue
        shown = notebook.show(number)
        shown.locator(".jupyter-widgets").first.wait_for()
        assert not shown.get_by_text(re.compile("Error displaying widget|Loading widget|Error creating widget")).count()
        if "lab.ordering(" in cell["source"]:
            put_in_order(shown, cell["source"])
        if shown.get_by_role("button", name="Which method?").count():
            ask_for_a_method(shown)
        if shown.locator("button[title^='Answer ']").count():
            answer(shown)
            answered += 1
        sliders, pictures = shown.locator(".widget-slider"), shown.locator("img.widget-image")
        for i in range(sliders.count() if pictures.count() else 0):
            move(shown, sliders.nth(i), pictures.nth(min(i, pictures.count() - 1)))
            moved += 1
        notebook.picture(f"cell{number + 1:02}")
    assert answered >= 1
    assert moved >= 1 or notebook.name != "07_nf4"
    assert not [line for line in notebook.said if line.startswith("page error")], notebook.said
