"""The table and the picture of probes, with numbers worked out by hand."""

from __future__ import annotations

import io
from dataclasses import replace

from matplotlib import rc_context
from PIL import Image

from tests.builders import episodes
from torchrl_sql.evaluation.episodes import EpisodeResult
from torchrl_sql.evaluation.probing import ProbeProtocol, ProbeResult, ProbeScore, read_probes
from torchrl_sql.evaluation.tables import TableWriter
from torchrl_sql.report import Analysis, write_report
from torchrl_sql.report.gather import gather
from torchrl_sql.report.model import Picture
from torchrl_sql.report.probes import probe_plot, probe_table
from torchrl_sql.report.style import STYLE

SCORES = {  # (agent, seed): R^2 of two labels
    ("mae", 0): (0.5, 0.25), ("mae", 1): (0.75, 0.75), ("random", 0): (0.25, -3.0), ("pixels", None): (1.0, 0.5),
    ("ql", 0): (0.5, 0.75), ("ql", 1): (0.5, 0.5),
}  # fmt: skip


def result():
    scores = [
        ProbeScore(agent, seed, "Pong", label, r2, 10)
        for (agent, seed), values in SCORES.items()
        for label, r2 in zip(("ball x", "score"), values, strict=True)
    ]
    return ProbeResult(
        scores=scores, left_out=["Pong: lives is constant"], policies=[], protocol=ProbeProtocol(), made={"date": "now"}
    )


def test_the_table_has_means_and_ranges_over_seeds_trained_encoders_first_and_the_best_of_them_marked():
    table = probe_table(result())
    assert [*table.header] == ["Label", "mae", "ql", "random", "pixels"]
    assert [[str(cell) for cell in row] for row in table.rows] == [
        ["Pong: ball x", "0.62* 0.50 to 0.75", "0.50 0.50 to 0.50", "0.25", "1.00"],
        ["Pong: score", "0.50 0.25 to 0.75", "0.62* 0.50 to 0.75", "-3.00", "0.50"],
        # Of mae's seeds 0.375 and 0.75, of ql's 0.625 and 0.5.
        ["mean of all", "0.56* 0.38 to 0.75", "0.56* 0.50 to 0.62", "-1.38", "0.75"],
    ]
    assert table.caption.endswith("Not read: Pong: lives is constant.")


def test_the_picture_has_a_dot_per_label_and_encoder_and_a_line_over_its_seeds():
    with rc_context(STYLE):
        plot = probe_plot(result())
    (axes,) = plot.figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["Pong: ball x", "Pong: score", "mean of all"]
    dots = {container.get_label(): container for container in axes.containers}
    assert [*dots] == ["mae", "ql", "random", "pixels"]
    points, _, (bars,) = dots["mae"]
    assert list(points.get_xdata()) == [0.625, 0.5, 0.5625]
    assert [round(float(height)) for height in points.get_ydata()] == [0, 1, 2]
    assert [line[:, 0].tolist() for line in bars.get_segments()] == [[0.5, 0.75], [0.25, 0.75], [0.375, 0.75]]
    assert list(dots["random"][0].get_xdata()) == [0.25, -0.2, -0.2]  # what is less is drawn there
    assert plot.description == "Means over all labels: mae 0.56, ql 0.56, random -1.38, pixels 0.75"
    assert plot.png() and plot.svg


def test_a_studys_page_shows_probes_and_reconstructions_and_keeps_them_as_files(tmp_path):
    found = replace(result(), made={"command": "torchrl-sql probe runs", "date": "today", "commit": "c0ffee"})
    found.write(tmp_path / "probes.json")
    (tmp_path / "study.yaml").write_text("title: T\ndata: collect\nreport: {main: after}\nruns: {after: {}}")
    folder = tmp_path / "after" / "seed0"
    folder.mkdir(parents=True)
    with TableWriter(folder / "scores.csv", EpisodeResult) as table:
        table.append(episodes("after", "Breakout", [1.0, 2.0]))
    data = gather([tmp_path])
    assert data.probes == found and data.reconstructions == []
    assert gather([folder]).probes is None  # of a study as a whole
    picture = Picture(
        name="reconstructions_mae", title="Reconstructions", caption="Frames of mae.", data=probe_picture()
    )
    page = write_report(Analysis(replace(data, reconstructions=[picture])), tmp_path / "report.html").read_text()
    assert "What is in the encoders" in page and "torchrl-sql probe runs</code> on today, commit c0ffee" in page
    assert 'aria-label="Means over all labels: mae 0.56' in page and 'alt="Frames of mae."' in page
    files = tmp_path / "report_files"
    assert (files / "reconstructions_mae.png").read_bytes() == picture.data
    assert "Pong,ball x,mae,0.625,0.5,0.75,2" in (files / "probes.csv").read_text()
    assert (files / "probes.png").exists() and (files / "probes.tex").exists()
    plain = write_report(Analysis(gather([folder])), folder / "report.html").read_text()
    assert "What is in the encoders" not in plain


def probe_picture():
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    return file.getvalue()


def test_a_file_of_probes_holds_what_was_found(tmp_path):
    result().write(tmp_path / "probes.json")
    assert read_probes(tmp_path / "probes.json") == result()
