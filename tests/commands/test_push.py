"""What would be pushed to the hub: a student's files and a card that says where it comes from."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import ModelCard, constants

from limbeck.commands.push import push
from limbeck.errors import ConfigError, TryLaterError
from limbeck.files import publish
from limbeck.report.run_report import write_report
from tests.report.example_run import evaluation, write_run

PARITY = {
    "mean_kl": 0.0046,
    "max_kl": 0.03,
    "same_top": 0.971,
    "student_perplexity": 20.0,
    "exported_perplexity": 20.1,
}


def finished(folder, **changes):
    """A finished run with a student and an exported file."""
    write_run(folder)
    measured = {"exports": {"gguf-q8_0": {"file": "x-q8_0.gguf", "bytes": 3, "parity": PARITY}}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation() | measured))
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance["teacher"] |= changes
    (folder / "provenance.json").write_text(json.dumps(provenance))
    write_report(folder)
    publish(folder / "student", lambda place: (place / "config.json").write_text("{}"), {})
    (folder / "exports" / "gguf-q8_0").mkdir(parents=True)
    (folder / "exports" / "gguf-q8_0" / "x-q8_0.gguf").write_text("abc")
    (folder / "exports" / "onnx").mkdir()
    for name in ("x.onnx", "x.onnx.data", "manifest.json"):
        (folder / "exports" / "onnx" / name).write_text("abc")
    return folder


def pushed(run, folder, **options):
    push(run, "me/tiny", dry_run=True, output=folder, **options)
    return ModelCard.load(folder / "README.md")


def test_a_dry_run_writes_the_whole_repository(tmp_path):
    run = finished(tmp_path / "run", name="owner/teacher", weights_sha256="ab" * 32)
    card = pushed(run, tmp_path / "out", license="apache-2.0")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"README.md", "config.json", "report.html", "x-q8_0.gguf", "onnx"}
    graph = {path.name for path in (tmp_path / "out" / "onnx").iterdir()}
    assert graph == {"x.onnx", "x.onnx.data"}
    assert (card.data.base_model, card.data.license) == ("owner/teacher", "apache-2.0")
    found = {each.metric_type: each.metric_value for each in card.data.eval_results}
    figures = evaluation()["trials"]["distilled"]
    assert found == {
        name: pytest.approx(figures[name]["value"], abs=1e-6)
        for name in ("forward_kl", "top1_agreement", "cross_entropy", "bits_per_byte")
    }
    low, high = (f"{figures['forward_kl'][end]:.3f}" for end in ("low", "high"))
    assert f"[{low}, {high}]" in card.text
    assert "| x-q8_0.gguf | 0.0046 | 97.10% | 20.100 (20.000) |" in card.text
    assert (run / "recipe.yaml").read_text().strip() in card.text
    assert "ab" * 32 in card.text


@pytest.mark.parametrize(("base", "stays"), [("owner/base", True), ("/models/base", False)])
def test_adapters_whose_base_is_a_folder_of_this_machine_are_left_out(base, stays, tmp_path):
    run = finished(tmp_path / "run")
    shutil.rmtree(run / "student")

    def write(place):
        (place / "config.json").write_text("{}")
        (place / "adapter").mkdir()
        settings = json.dumps({"base_model_name_or_path": base})
        (place / "adapter" / "adapter_config.json").write_text(settings)

    publish(run / "student", write, {})
    pushed(run, tmp_path / "out", license="apache-2.0")
    assert (tmp_path / "out" / "config.json").exists()
    assert (tmp_path / "out" / "adapter").exists() == stays


def test_the_licence_is_that_of_the_teachers_card(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "README.md").write_text("---\nlicense: llama3.2\n---\n# A teacher\n")
    run = finished(tmp_path / "run", name=str(tmp_path / "teacher"))
    card = pushed(run, tmp_path / "out")
    assert card.data.license == "llama3.2"
    assert card.data.base_model is None
    assert str(tmp_path) not in card.text


def test_an_unknown_licence_is_reported_and_nothing_is_uploaded(tmp_path):
    run = finished(tmp_path / "run")
    card = pushed(run, tmp_path / "out")
    assert card.data.license is None
    assert "licence was not found" in card.text
    with pytest.raises(ConfigError, match="licence was not found"):
        push(run, "me/tiny")


def test_mistakes_are_named_before_anything_is_written(tmp_path):
    run = finished(tmp_path / "run")
    for options, message in (
        ({"repo": "tiny"}, "OWNER/NAME"),
        ({"dry_run": True}, "go together"),
        ({"run": tmp_path}, "must be a finished run"),
    ):
        with pytest.raises(ConfigError, match=message):
            push(**{"run": run, "repo": "me/tiny", **options})


class Refusing(BaseHTTPRequestHandler):
    """A hub that lets nobody write."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        """Silent."""


def test_a_hub_that_refuses_or_does_not_answer_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    run = finished(tmp_path / "run")
    hub = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    with pytest.raises(ConfigError, match=r"refuses \(status 401\). Log in with `hf auth login`"):
        push(run, "me/tiny", license="apache-2.0")
    hub.shutdown()
    hub.server_close()
    with pytest.raises(TryLaterError, match="is out of reach or busy"):
        push(run, "me/tiny", license="apache-2.0")
