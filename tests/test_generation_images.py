"""Drawing among the image ids alone, against drawing among all ids."""

import pytest
import torch
from conftest import GRID_SIZE, IMAGE_SIZE, TEXT_SIZE, small_model
from transformers import LogitsProcessor, LogitsProcessorList, MaxTimeCriteria, RepetitionPenaltyLogitsProcessor
from transformers.generation import TopKLogitsWarper
from transformers.generation.streamers import BaseStreamer

from cm3leon_hf.generation_images import OF_ANY_IDS, ImageLogitsProcessor, of_all_ids
from cm3leon_hf.logits_processors import (
    BatchedGuidanceLogitsProcessor,
    ContrastiveLogitsProcessor,
    ImageTextGuidanceLogitsProcessor,
    ModalityLogitsProcessor,
)

IMAGE_LENGTH = GRID_SIZE**2
PROMPTS = torch.tensor([[1, 300, 301, 2], [1, 302, 303, 2]])
WATCH = {"return_dict_in_generate": True, "output_scores": True}
STRATEGIES = [
    {"guidance_scale": 1.0},
    {"guidance_scale": 3.0},
    {"contrastive_k": 3},
    {"guidance_scale": 2.0, "repetition_penalty": 1.5},
    {"guidance_scale": 2.0, "bad_words_ids": [[TEXT_SIZE], [TEXT_SIZE + 1]]},
    {"guidance_scale": 2.0, "jacobi_window": 3},
]
OPTIONS = {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3}


class Favourite(LogitsProcessor):
    """A caller's processor, which knows ids and keeps what it was shown."""

    def __init__(self, favourite: int):
        self.favourite, self.shown = favourite, []

    def __call__(self, input_ids, scores):
        self.shown.append(input_ids)
        assert scores.shape[1] == TEXT_SIZE + IMAGE_SIZE
        return scores.index_fill(1, torch.tensor([self.favourite]), 100.0)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_greedy_pictures_are_those_of_all_ids(strategy):
    model = small_model()
    ours = model.generate(PROMPTS, generation_mode="image", do_sample=False, **strategy, **WATCH)
    if "jacobi_window" in strategy:
        strategy = {"guidance_scale": 2.0}
    theirs = model.generate(PROMPTS, generation_mode="image", do_sample=False, output_logits=True, **strategy, **WATCH)
    assert torch.equal(ours.sequences, theirs.sequences)
    for one, other in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_of_sampling_keeps_what_it_keeps_of_all_ids(option):
    model = small_model()
    arguments = {"generation_mode": "image", "do_sample": True, "temperature": 0.7, "top_k": 0}
    arguments |= {option: OPTIONS[option]} | WATCH
    first, other = (model.generate(PROMPTS, **arguments, **also).scores[0] for also in ({}, {"output_logits": True}))
    torch.testing.assert_close(first, other)
    assert first[:, TEXT_SIZE:].isneginf().any()


@pytest.mark.parametrize("kind", OF_ANY_IDS, ids=lambda kind: kind.__name__)
def test_what_takes_scores_of_any_ids_does_the_same_to_both(kind):
    guidance = {
        BatchedGuidanceLogitsProcessor: ((2.0,), 2),
        ContrastiveLogitsProcessor: ((0.1, 3), 2),
        ImageTextGuidanceLogitsProcessor: ((7.5, 1.5), 3),
        TopKLogitsWarper: ((3,), 1),
    }
    arguments, branches = guidance.get(kind, ((0.3,), 1))
    images = slice(TEXT_SIZE, TEXT_SIZE + IMAGE_SIZE)
    scores = 3 * torch.randn(branches * 2, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    one = kind(*arguments)
    torch.testing.assert_close(of_all_ids(one(PROMPTS, scores), images), one(PROMPTS, of_all_ids(scores, images)))


def test_processors_that_know_ids_get_all_of_them(vocabulary):
    scores = torch.randn(2, vocabulary.image_size)
    drawn = torch.cat([PROMPTS, torch.tensor([[TEXT_SIZE + 4], [TEXT_SIZE + 5]])], dim=1)
    stock = [ModalityLogitsProcessor(vocabulary, "image"), RepetitionPenaltyLogitsProcessor(2.0), TopKLogitsWarper(5)]
    ours = ImageLogitsProcessor(LogitsProcessorList(stock), vocabulary)(drawn, scores)
    theirs = LogitsProcessorList(stock)(drawn, of_all_ids(scores, vocabulary.image_ids))
    assert torch.equal(ours, theirs[:, vocabulary.image_ids])


def test_a_callers_processor_and_streamer_see_ids():
    class Kept(BaseStreamer):
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids.append(value.view(len(PROMPTS[:1]), -1))

        def end(self):
            self.ids = torch.cat(self.ids, dim=1)

    favourite, streamer = Favourite(TEXT_SIZE + 7), Kept()
    drawn = small_model().generate(
        PROMPTS[:1], generation_mode="image", logits_processor=LogitsProcessorList([favourite]), streamer=streamer
    )
    assert (drawn[:, 4:] == TEXT_SIZE + 7).all() and drawn.shape[1] == 4 + IMAGE_LENGTH
    assert torch.equal(streamer.ids, drawn)
    assert torch.equal(favourite.shown[-1], drawn[:, :-1])


def test_code_1_is_not_taken_for_the_end():
    """Codes are counted from 0, where the ids of `<eos>` and its like stand."""
    model = small_model()
    for code in range(6):
        favourite = LogitsProcessorList([Favourite(TEXT_SIZE + code)])
        drawn = model.generate(PROMPTS, generation_mode="image", logits_processor=favourite, do_sample=False)
        assert (drawn[:, 4:] == TEXT_SIZE + code).all() and drawn.shape[1] == 4 + IMAGE_LENGTH


def test_a_callers_criteria_still_stop():
    drawn = small_model().generate(PROMPTS, generation_mode="image", stopping_criteria=[MaxTimeCriteria(0.0)])
    assert drawn.shape[1] == 5 and (drawn[:, 4:] >= TEXT_SIZE).all()
