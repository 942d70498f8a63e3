"""osaurus doctor, as far as it can be told without measuring."""

from __future__ import annotations

from pathlib import Path

from osaurus_grpc.cli.doctor import draft_text
from osaurus_grpc.models.catalog import Catalog
from tests.models.test_residency import another_vocabulary, copies


def test_it_says_for_which_models_the_draft_model_can_guess(tiny_dir: Path, tmp_path: Path) -> None:
    copies(tiny_dir, tmp_path, "alike", "draft", "unlike")
    another_vocabulary(tmp_path / "unlike")
    said = draft_text(Catalog(tmp_path), "draft")
    assert said == "draft: guesses for alike; not for unlike, of another vocabulary"
    assert draft_text(Catalog(tmp_path), "nowhere") == "Model not found: nowhere"
