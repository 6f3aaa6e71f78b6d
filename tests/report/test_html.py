"""The report in headless Chromium: it loads nothing, logs nothing, and fits a laptop and a phone in both themes."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.builders import calibration_point, episode, returns
from torchrl_sql.report import Agent, Analysis, Clip, Curve, GameData, ReportData, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
]  # fmt: skip
# Chromium reads commands from descriptor 3 and answers on 4; this puts the pipes there and becomes Chromium.
LAUNCH = (
    "import fcntl, os, sys\n"
    "read, write = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])\n"
    "os.dup2(read, 3); os.dup2(write, 4)\n"
    "os.execv(sys.argv[3], sys.argv[3:])\n"
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)"),
]


class Browser:
    """One Chromium tab, spoken to in the DevTools protocol over pipes."""

    def __init__(self, profile):
        read_commands, self._commands = os.pipe()
        self._answers, write_answers = os.pipe()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", LAUNCH, str(read_commands), str(write_answers)),
                *(CHROMIUM, *FLAGS, f"--user-data-dir={profile}"),
            ],
            pass_fds=(read_commands, write_answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        self._buffer, self._number, self._session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def _receive(self, deadline):
        while b"\0" not in self._buffer:
            if not select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("Chromium did not answer in 60 seconds")
            part = os.read(self._answers, 1 << 20)
            if not part:
                raise RuntimeError("Chromium ended")
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        os.write(self._commands, data)
        deadline = time.monotonic() + 60
        while (answer := self._receive(deadline)).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, path, *, width, theme):
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + 60
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive(deadline))

    def evaluate(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def screenshot(self):
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    def close(self):
        self._session = None
        self.call("Browser.close")
        self._process.wait(30)
        os.close(self._commands)
        os.close(self._answers)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    generator = np.random.default_rng(0)
    frames = [Image.fromarray(generator.integers(0, 255, (21, 16), dtype=np.uint8)) for _ in range(3)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    agents = [
        Agent(agent="scaled_ql", label="Scaled QL"),
        Agent(agent="bc", label="BC greedy"),
        Agent(agent="bc", label="BC sampled", decoding="sampled"),
    ]
    games = ["Breakout", "Freeway", "Assault"]
    episodes = [
        episode(
            agent.agent, game, generator.poisson(20), seed=seed, episode=number, episode_seed=number,
            gradient_step=step, decoding=agent.decoding,
        )
        for agent in agents
        for step in (2500, 5000)
        for seed in range(3)
        for game in games
        for number in range(5)
    ]  # fmt: skip
    calibration = [
        calibration_point(
            "scaled_ql", game, gradient_step=5000, episode_seed=number, agent_step=step,
            predicted_value=float(generator.normal(3, 1)), discounted_return=float(generator.normal(2, 1)),
        )
        for game in games
        for number in range(3)
        for step in range(0, 500, 50)
    ]  # fmt: skip
    good = returns(16.5, 4.0, 20)
    data = ReportData(
        title="Quickstart: one offline Q-learning policy for three games",
        introduction=["A paragraph of a sensible length that says what was run, and on which data, and why. " * 3],
        games=games,
        agents=agents,
        episodes=episodes,
        calibration=calibration,
        game_data=[
            GameData(
                game=game, behaviour_text="A third of the episodes follow a script.", num_transitions=100_000,
                num_episodes=500, bytes_per_transition=180.0, behaviour=good, action_counts=list(range(18)),
                behaviours={"skilled": good, "lazy": good},
            )
            for game in games
        ],
        constant_actions={game: {"DOWNRIGHTFIRE": good} for game in games},
        curves=[
            Curve(agent="bc", label="BC", metric=metric, seed=0, gradient_steps=[0, 1, 2], values=[3, 2, 1])
            for metric in ("Cross-entropy (nats)", "Gradient norm")
        ],
        clips=[Clip(game=game, caption="Seed 0, return 21.", data=file.getvalue()) for game in games],
        settings={"Model": {"encoder": "resnet_small", "a.rather.long.setting.name": "/and/a/long/value" * 4}},
        versions={"torch": "2.13.0"},
    )  # fmt: skip
    return write_report(Analysis(data), tmp_path_factory.mktemp("run") / "report.html")


@pytest.fixture(scope="module")
def page_of_many_games(paper_scale_report, tmp_path_factory):
    return write_report(Analysis(paper_scale_report), tmp_path_factory.mktemp("run") / "report.html")


@pytest.mark.parametrize(
    ("name", "width", "theme"),
    [
        *(("page", width, theme) for width in (1280, 390) for theme in ("light", "dark")),
        ("page_of_many_games", 1280, "light"),
        ("page_of_many_games", 390, "dark"),
    ],
)
def test_page_in_chromium(browser, name, width, theme, request):
    page = request.getfixturevalue(name)
    browser.open(page, width=width, theme=theme)
    pixels = browser.screenshot().astype(int)
    browser.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true }); 0")
    trouble = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Network.loadingFailed")
    assert [event for event in browser.events if event["method"] in trouble] == []
    requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out of the page
    assert browser.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert browser.evaluate(
        "[...document.querySelectorAll('nav a')].every(link => document.querySelector(link.getAttribute('href')))"
    )
    assert browser.evaluate("[...document.querySelectorAll('a[download]')].every(link => link.href.length > 40)")
    # Text in plots stays legible: no label smaller than 6 CSS pixels.
    smallest = browser.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].map(text => parseFloat(getComputedStyle(text).fontSize)"
        " * text.ownerSVGElement.getBoundingClientRect().width / text.ownerSVGElement.viewBox.baseVal.width))"
    )
    assert smallest >= 6
    # Plots stay inside their own frame: no label is cut off (half a unit of rounding aside).
    cut_off = browser.evaluate(
        "[...document.querySelectorAll('svg text')].filter(text => { const t = text.getBoundingClientRect(), "
        "f = text.ownerSVGElement.getBoundingClientRect(); return t.left < f.left - 1 || t.right > f.right + 1 })"
        ".map(text => text.textContent)"
    )
    assert cut_off == []
    background = pixels[0, 0].mean()
    assert background > 245 if theme == "light" else background < 40
    assert pixels.shape[1] == width
    assert (abs(pixels - pixels[0, 0]).max(-1) > 60).mean() > 0.01  # there is ink on it


@pytest.mark.parametrize("name", ["page", "page_of_many_games"])
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_the_first_screen_has_a_picture_and_a_table(browser, name, width, height, request):
    browser.open(request.getfixturevalue(name), width=width, theme="light")
    assert browser.evaluate("document.querySelector('.lead svg').getBoundingClientRect().bottom") < height
    assert browser.evaluate("document.querySelector('.lead tbody tr').getBoundingClientRect().bottom") < height
    assert browser.evaluate("document.querySelector('h3').textContent") == "Caveats"


def test_a_click_on_a_heading_sorts_the_table(browser, page):
    browser.open(page, width=1280, theme="light")
    column = "[...document.querySelectorAll('.lead tbody tr')].map(row => row.cells[%d].innerText.split(/[ \\n]/)[0])"
    click = "document.querySelectorAll('.lead thead button')[%d].click(); 0"
    browser.evaluate(click % 1)
    values = browser.evaluate(column % 1)
    known = [float(value.replace(",", "")) for value in values if value != "–"]
    assert known == sorted(known, reverse=True) and len(known) > 3
    assert browser.evaluate("document.querySelector('.lead thead th[aria-sort]').ariaSort") == "descending"
    browser.evaluate(click % 1)
    assert [float(v.replace(",", "")) for v in browser.evaluate(column % 1) if v != "–"] == known[::-1]
    browser.evaluate(click % 0)
    names = browser.evaluate("[...document.querySelectorAll('.lead tbody th')].map(head => head.innerText)")
    assert names == sorted(names, key=str.casefold)
