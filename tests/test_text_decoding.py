"""Words from the network: the training pass, the cache and the searches say the same."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_network import pictures, small_network

from visionllm.instruction import Instruction
from visionllm.instruction.instruction import TASKS
from visionllm.model.llm import KVCache
from visionllm.model.text_decoding import decode_text
from visionllm.text_options import TextOptions
from visionllm.tokenizer import PADDING
from visionllm.train.text_loss import written, written_loss

INSTRUCTIONS = [
    Instruction("vqa", question="What is it?"),
    Instruction("captioning"),
    Instruction("vqa", question="How many red things are there in this picture?"),
]
BOS, EOS = 1, 2  # of the tokenizer that comes with the package
SAME = 2e-5  # of logits of size 1 to 10 in fp32: sums in another order


@pytest.fixture(scope="module", params=[0, 2], ids=["no layers for words", "two layers for words"])
def network(request):
    network = small_network(tasks=TASKS, word_layers=request.param)
    with torch.no_grad():  # far from ties
        network.text_head.query.weight *= 8
    return network


@pytest.fixture(scope="module")
def prompts(network):
    """Embedded prompts [3, P, C] and their mask."""
    with torch.no_grad():
        ids = network.tokenizer.prompts(INSTRUCTIONS, network.config.num_queries)
        tokens = network.image_tokens(pictures(3), network.encode_text(ids))
        return network.embed(ids, tokens), ids.ids != PADDING


def cache_of(network, prompts, rows=slice(None), room=40):
    prefix, mask = prompts[0][rows], prompts[1][rows]
    cache = KVCache(len(prefix), prefix.shape[1] + room, network.device)
    network.llm.read(prefix, mask, cache, words=True)
    return cache


def step_logits(network, prompts, row, pieces):
    """Logits after <bos> and the pieces, from one whole pass without padding or cache: [V]."""
    prefix = prompts[0][row, : int(prompts[1][row].sum())]
    x = torch.cat([prefix, network.embedding(torch.tensor([BOS, *pieces]))])[None]
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    states, _ = network.llm(x, mask, x.new_zeros(1, 0, 1, x.shape[-1]), words=True)
    return network.text_head(states[0, -1], network.embedding.weight[: network.tokenizer.vocab_size])


@torch.no_grad()
def test_greedy_is_the_likeliest_piece_of_the_whole_pass(network, prompts):
    texts = decode_text(network, cache_of(network, prompts), TextOptions(max_tokens=6))
    for row, text in enumerate(texts):
        pieces: list[int] = []
        for _ in range(6):
            piece = int(step_logits(network, prompts, row, pieces).argmax())
            if piece == EOS:
                break
            pieces.append(piece)
        assert text == network.tokenizer.decode(pieces).strip()


@torch.no_grad()
def test_the_loss_is_a_mean_over_the_pieces_of_every_text(network, prompts):
    """Those of a text of n weigh 1 / √n."""
    texts = ["a dog", "two red cats and a teddy bear", ""]
    total, weights, count, right = 0.0, 0.0, 0, 0
    for row, text in enumerate(texts):
        pieces = network.tokenizer.answer_ids(text)
        assert pieces[0] == BOS and pieces[-1] == EOS
        for k, wanted in enumerate(pieces[1:]):
            logits = step_logits(network, prompts, row, pieces[1 : k + 1])
            weight = (len(pieces) - 1) ** -0.5
            total += weight * float(F.cross_entropy(logits[None], torch.tensor([wanted])))
            weights += weight
            right += int(logits.argmax()) == wanted
            count += 1
    loss, accuracy = written_loss(network, prompts[0], prompts[1].sum(1), *written(network, texts))
    assert float(loss) == pytest.approx(total / weights, abs=SAME)
    assert float(accuracy) == pytest.approx(right / count)


@torch.no_grad()
def test_further_turns_teach_their_answers_alone(network, prompts):
    """A question is read, not learned; its answer is learned behind everything before it."""
    tokenizer = network.tokenizer
    turns = [[], [("Where?", "on the left"), ("How many?", "2")], [("Why?", "")]]
    texts = ["a dog", "two red cats", "no"]
    total, weights = 0.0, 0.0
    for row, text in enumerate(texts):
        before: list[int] = []  # behind the first <bos>
        for question, answer in [(None, text), *turns[row]]:
            if question is not None:
                before += [EOS, *tokenizer.encode(question), BOS]
            pieces = tokenizer.answer_ids(answer)[1:]
            for piece in pieces:
                logits = step_logits(network, prompts, row, before)
                total += float(F.cross_entropy(logits[None], torch.tensor([piece]))) / len(pieces) ** 0.5
                weights += len(pieces) ** -0.5
                if piece != EOS:
                    before.append(piece)
    loss, _ = written_loss(network, prompts[0], prompts[1].sum(1), *written(network, texts, turns))
    assert float(loss) == pytest.approx(total / weights, abs=SAME)


@torch.no_grad()
def test_padding_beside_shorter_prompts_changes_nothing(network, prompts):
    options = TextOptions(max_tokens=8)
    together = decode_text(network, cache_of(network, prompts), options)
    for row in range(3):
        length = int(prompts[1][row].sum())
        alone = (prompts[0][:, :length], prompts[1][:, :length])
        assert decode_text(network, cache_of(network, alone, slice(row, row + 1)), options) == [together[row]]


@torch.no_grad()
def test_beams_of_a_row_do_not_depend_on_the_others():
    """Rows that have found their texts wait for the others, and collect no more."""
    network = small_network(tasks=TASKS)
    network.text_head.query.weight *= 4
    often = torch.zeros(network.tokenizer.vocab_size)
    often[EOS] = 4.0
    head = network.text_head.forward
    network.text_head.forward = lambda states, pieces: head(states, pieces) + often
    words = ("dog", "two red cars", "cup", "a very long question about a teddy bear", "left", "person")
    asked = [Instruction("vqa", question=f"Is it {text}?") for text in words]
    options = TextOptions(max_tokens=30, beams=2)
    together = network.write(pictures(6), asked, options)
    alone = [network.write(pictures(6)[i : i + 1], asked[i : i + 1], options)[0] for i in range(6)]
    assert together == alone


def log_probability(network, prompts, row, text_ids):
    """Mean over the pieces, <eos> among them."""
    total = 0.0
    for k, wanted in enumerate([*text_ids, EOS]):
        total += float(F.log_softmax(step_logits(network, prompts, row, text_ids[:k]), -1)[wanted])
    return total / (len(text_ids) + 1)


@torch.no_grad()
def test_beams_find_what_a_search_of_everything_finds():
    """With three pieces and room for two, seven beams hold every text that there is."""
    network = small_network(tasks=TASKS)
    ids = network.tokenizer.prompts(INSTRUCTIONS[:1], network.config.num_queries)
    tokens = network.image_tokens(pictures(1), network.encode_text(ids))
    prompts = network.embed(ids, tokens), ids.ids != PADDING
    letters = [network.tokenizer.text_ids([letter])[0].tolist()[-1] for letter in ("a", "b")]
    allowed = torch.full((network.tokenizer.vocab_size,), -math.inf)
    allowed[[EOS, *letters]] = 0.0
    head = network.text_head.forward
    network.text_head.forward = lambda states, pieces: head(states, pieces) + allowed
    texts = [[], *([a] for a in letters), *([a, b] for a in letters for b in letters)]
    best = max(texts, key=lambda pieces: log_probability(network, prompts, 0, pieces))
    found = decode_text(network, cache_of(network, prompts), TextOptions(max_tokens=3, beams=7))
    assert found == [network.tokenizer.decode(best).strip()]


@torch.no_grad()
def test_sampling_follows_the_probabilities(network, prompts):
    """Of 400 draws of a first piece, each of the likeliest ones comes as often as it should."""
    logits = step_logits(network, prompts, 0, [])
    chances = logits.softmax(-1)
    prefix = prompts[0][:1].expand(400, -1, -1), prompts[1][:1].expand(400, -1)
    texts = decode_text(network, cache_of(network, prefix), TextOptions(max_tokens=1, temperature=1.0))
    by_text: dict[str, float] = {}
    for piece, chance in enumerate(chances.tolist()):
        text = "" if piece == EOS else network.tokenizer.decode([piece]).strip()
        by_text[text] = by_text.get(text, 0.0) + chance
    for text, chance in sorted(by_text.items(), key=lambda one: -one[1])[:3]:
        sigma = (400 * chance * (1 - chance)) ** 0.5
        assert abs(texts.count(text) - 400 * chance) <= 4.5 * sigma + 1


@torch.no_grad()
def test_the_likeliest_share_alone_is_drawn(network, prompts):
    likeliest = network.tokenizer.decode([int(step_logits(network, prompts, 0, []).argmax())]).strip()
    prefix = prompts[0][:1].expand(50, -1, -1), prompts[1][:1].expand(50, -1)
    options = TextOptions(max_tokens=1, temperature=1.0, top_p=1e-6)
    assert set(decode_text(network, cache_of(network, prefix), options)) == {likeliest}


class OnlyDigits:
    """One to three digits."""

    def allows(self, text):
        return text.isdigit() and len(text) <= 3

    def complete(self, text):
        return 1 <= len(text) <= 3


@torch.no_grad()
def test_a_grammar_binds_what_is_written(network, prompts):
    texts = decode_text(network, cache_of(network, prompts), TextOptions(max_tokens=9), grammar=OnlyDigits())
    assert all(text.isdigit() and len(text) <= 3 for text in texts)


class Nothing:
    def allows(self, text):
        return False

    def complete(self, text):
        return False


@torch.no_grad()
def test_a_grammar_that_allows_nothing_is_an_error(network, prompts):
    with pytest.raises(ValueError, match="allows nothing after ''"):
        decode_text(network, cache_of(network, prompts), TextOptions(max_tokens=2), grammar=Nothing())


@torch.no_grad()
def test_slots_over_the_cache_are_those_of_one_pass(network, prompts):
    length = int(prompts[1][0].sum())
    prefix, mask = prompts[0][:1, :length], prompts[1][:1, :length]
    slots = torch.randn(1, 4, 5, prefix.shape[-1], generator=torch.Generator().manual_seed(0))
    cache = KVCache(1, length, network.device)
    network.llm.read(prefix[:, :-7], mask[:, :-7], cache)
    network.llm.read(prefix[:, -7:], mask[:, -7:], cache)  # in two parts
    _, wanted = network.llm(prefix, mask, slots)
    torch.testing.assert_close(network.llm.answer(slots, cache), wanted, rtol=0, atol=SAME)
