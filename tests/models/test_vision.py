"""Prompts with images, on mlx-vlm's own models: what it computes of a whole prompt is the measure."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from osaurus_grpc.errors import CapabilityError, ContextLengthError, OverloadedError
from osaurus_grpc.models.facts import Capability, capabilities
from osaurus_grpc.models.vision import families, reader
from osaurus_grpc.models.vision.families import FAMILIES
from osaurus_grpc.models.vision.reader import ImageFile, ImageReader
from tests.harness.pictures import encoded, picture, png
from tests.harness.tiny_vision import MODELS, placeholder

PICTURES = [picture(1, 64, 48), picture(2, 40, 80)]
FILES = [ImageFile(encoded(each), f"messages[0].content[{i}].image") for i, each in enumerate(PICTURES)]


class Loaded(NamedTuple):
    reader: ImageReader
    model: Any
    mark: str

    def tokens(self, text: str) -> list[int]:
        return list(self.reader.tokenizer.encode(text.replace("#", self.mark), add_special_tokens=False))

    def prompt(self, text: str, *files: ImageFile) -> Any:
        return self.reader.prompt((), self.tokens(text), files, limit=2048)


@pytest.fixture(scope="module", params=MODELS)
def loaded(vision_dir: Path, request: pytest.FixtureRequest) -> Loaded:
    from mlx_vlm.utils import load_model

    from osaurus_grpc.models.vision.image_model import ImageModel

    folder = vision_dir / request.param
    model = load_model(folder)
    family = FAMILIES[model.config.model_type]
    made = ImageReader.load(folder, family)
    return Loaded(made, ImageModel(model, family), placeholder(request.param))


TEXT = "Before # between the two pictures # and behind them, some words more."


def whole(loaded: Loaded) -> Any:
    """What mlx-vlm makes of both images and the text in one call."""
    text = TEXT.replace("#", loaded.mark)
    prepared = loaded.reader._processor(text=[text], images=PICTURES)
    inputs = {key: value for key, value in prepared.items() if key != "attention_mask"}
    return inputs["input_ids"], loaded.model.vlm.get_input_embeddings(**inputs)


def test_the_tokens_are_those_of_mlx_vlm(loaded: Loaded) -> None:
    ids, _ = whole(loaded)
    assert list(loaded.prompt(TEXT, *FILES).token_ids) == np.array(ids)[0].tolist()


@pytest.mark.parametrize("cuts", [(), (1,), (7, 8), (16, 32, 48), (20, 21, 22, 23, 40)])
def test_parts_of_a_prompt_are_parts_of_what_mlx_vlm_makes_of_it(
    loaded: Loaded, cuts: tuple[int, ...]
) -> None:
    _, expected = whole(loaded)
    embeddings = np.array(expected.inputs_embeds)
    prompt = loaded.prompt(TEXT, *FILES)
    count = len(prompt.token_ids)
    # As prefill asks: from any place on, since a beginning may have been found.
    cuts = tuple(cut for cut in cuts if cut < count)
    for start, stop in zip((0, *cuts), (*cuts, count), strict=True):
        ids, inputs = prompt.inputs(loaded.model, start, prompt.names[start:stop])
        assert np.array(ids)[0].tolist() == list(prompt.token_ids[start:stop])
        found = inputs.get("input_embeddings", None)
        found = loaded.model.embed_text(ids) if found is None else found
        # Images alone and together are products of other shapes, which may sum in another order.
        close = 1e-4 * float(np.abs(embeddings).max())
        np.testing.assert_allclose(np.array(found), embeddings[:, start:stop], rtol=1e-5, atol=close)
        if expected.deepstack_visual_embeds is not None:
            pieces = np.array(prompt.names) < 0
            within = pieces[start:stop]
            before = int(pieces[:start].sum())
            if within.any():
                assert np.array_equal(np.array(inputs["visual_pos_masks"])[0], within)
                deepstack = np.stack([np.array(layer) for layer in expected.deepstack_visual_embeds])
                wanted = deepstack[:, before : before + int(within.sum())]
                found = np.array(inputs["deepstack_visual_embeds"])
                np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        if expected.position_ids is not None:
            positions = np.array(expected.position_ids)[..., start:stop]
            assert np.array_equal(np.array(inputs["position_ids"]), positions)
    delta = 0 if expected.rope_deltas is None else int(np.array(expected.rope_deltas).item())
    assert prompt.position_delta == delta


def test_what_was_generated_goes_on_behind_the_prompt(loaded: Loaded) -> None:
    """A sequence that lost its row is prefilled again, its answer so far included."""
    prompt = loaded.prompt(TEXT, *FILES)
    count = len(prompt.token_ids)
    ids, inputs = prompt.inputs(loaded.model, count - 2, [*prompt.names[-2:], 5, 6, 7])
    assert np.array(ids)[0].tolist() == [*prompt.token_ids[-2:], 5, 6, 7]
    later, more = prompt.inputs(loaded.model, count + 1, [6, 7])
    assert np.array(later)[0].tolist() == [6, 7]
    if "position_ids" in inputs:
        wanted = count + prompt.position_delta + np.arange(3)
        assert np.array_equal(np.array(inputs["position_ids"])[:, 0, 2:], np.tile(wanted, (3, 1)))
        assert np.array_equal(np.array(more["position_ids"])[:, 0], np.tile(wanted[1:], (3, 1)))


def test_names_tell_images_apart_and_nothing_else(loaded: Loaded) -> None:
    first, second = FILES
    one, same, other = (loaded.prompt("A # b", file) for file in (first, first, ImageFile(png(9), "")))
    assert one.names == same.names
    assert one.token_ids == other.token_ids
    pieces = [place for place, name in enumerate(one.names) if name < 0]
    assert {one.token_ids[place] for place in pieces} == {loaded.reader.image_token_id}
    assert not set(np.take(one.names, pieces)) & set(np.take(other.names, pieces))
    assert all(-(2**31) <= name < 0 for name in np.take(one.names, pieces))
    places = set(range(len(one.names))) - set(pieces)
    assert all(one.names[place] == one.token_ids[place] for place in places)
    # The same image a second time has the same names, wherever it stands.
    twice = loaded.prompt("A # b # c #", first, second, first)
    named = [name for name in twice.names if name < 0]
    assert named[: len(pieces)] == named[-len(pieces) :]


def test_images_and_their_places_must_agree(loaded: Loaded) -> None:
    for text, files in (("none", FILES[:1]), ("# and #", FILES[:1]), ("#", FILES)):
        with pytest.raises(CapabilityError, match="does not show images") as refused:
            loaded.prompt(text, *files)
        assert refused.value.field == FILES[0].field


def test_images_that_cannot_fit_are_not_all_read(loaded: Loaded) -> None:
    tokens = loaded.tokens("# # #")
    unreadable = ImageFile(b"not read", "")
    with pytest.raises(ContextLengthError) as refused:
        loaded.reader.prompt((), tokens, [FILES[0], unreadable, unreadable], limit=len(tokens) + 4)
    assert "at least" in refused.value.message


def test_images_in_flight_are_bounded(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = ImageReader(loaded.reader._processor, loaded.reader._family)

    def prompt(*seeds: int, limit: int | None = 2048) -> Any:
        files = [ImageFile(png(seed), "") for seed in seeds]
        return fresh.prompt((), loaded.tokens("#" * len(files)), files, limit=limit)

    monkeypatch.setattr(reader, "_KEPT_BYTES", 0)
    monkeypatch.setattr(reader, "_MOST_BYTES", 1 + fresh._read(FILES[0]).nbytes)
    assert len(prompt(70, 71, 72, 73, limit=None).token_ids) > 4  # counted, and not kept
    held = prompt(74, 75)
    with pytest.raises(OverloadedError):
        prompt(76)
    del held
    gc.collect()
    prompt(76)


def test_capabilities_need_mlx_vlm_a_listed_family_and_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    eyes = {"model_type": "qwen2_vl", "vision_config": {}}
    monkeypatch.setattr(families, "is_installed", lambda: True)
    assert Capability.VISION in capabilities(eyes, "{{ messages }}")
    assert Capability.VISION not in capabilities(eyes, "")
    assert Capability.VISION not in capabilities({"model_type": "qwen2_vl"}, "{{ messages }}")
    assert Capability.VISION not in capabilities({**eyes, "model_type": "mllama"}, "{{ messages }}")
    monkeypatch.setattr(families, "is_installed", lambda: False)
    assert Capability.VISION not in capabilities(eyes, "{{ messages }}")
