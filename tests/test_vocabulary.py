import pytest
import torch

from cm3leon_hf.vocabulary import CONTROL_TOKENS, Vocabulary


def test_the_papers_layout():
    vocabulary = Vocabulary()
    assert (vocabulary.size, vocabulary.image_length) == (64512, 1024)
    assert vocabulary.image_ids == slice(56320, 64512)


def test_special_tokens_are_the_first_ids():
    vocabulary = Vocabulary(text_size=300, num_locations=4)
    assert vocabulary.special_tokens == [*CONTROL_TOKENS, "<loc_0>", "<loc_1>", "<loc_2>", "<loc_3>"]
    ids = (vocabulary.pad_id, vocabulary.eos_id, vocabulary.break_id, vocabulary.mask_id, vocabulary.infill_id)
    assert [*ids, vocabulary.image_id] == list(range(6))
    assert [vocabulary.special_tokens[id] for id in ids] == ["<pad>", "<eos>", "<break>", "<mask>", "<infill>"]


def test_codes_become_ids_and_codes_again(vocabulary):
    codes = torch.arange(vocabulary.image_size).view(2, -1)
    ids = vocabulary.codes_to_ids(codes)
    assert ids.min() == vocabulary.text_size and ids.max() == vocabulary.size - 1
    assert vocabulary.is_image(ids).all()
    assert torch.equal(vocabulary.ids_to_codes(ids), codes)


def test_text_ids_are_no_image_ids(vocabulary):
    assert not vocabulary.is_image(torch.arange(vocabulary.text_size)).any()


@pytest.mark.parametrize("code", [-1, 32])
def test_codes_outside_the_codebook_are_refused(vocabulary, code):
    with pytest.raises(ValueError, match=r"codes in \[0, 32\)"):
        vocabulary.codes_to_ids(torch.tensor([0, code]))


@pytest.mark.parametrize("id", [599, 632])
def test_ids_that_are_no_image_tokens_are_refused(vocabulary, id):
    with pytest.raises(ValueError, match=r"image ids in \[600, 632\)"):
        vocabulary.ids_to_codes(torch.tensor([600, id]))


def test_special_tokens_need_room():
    with pytest.raises(ValueError, match="text_vocab_size"):
        Vocabulary(text_size=261)
