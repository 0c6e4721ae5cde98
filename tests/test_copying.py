"""Words that answers take over from their question."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_network import SMALL, pictures, small_network, text_batch

from visionllm.instruction import Instruction
from visionllm.instruction.instruction import TASKS
from visionllm.model.copying import COPY_DIM, CopyHead, CopySource, copyable, mixed, mixed_loss
from visionllm.model.told import told_of
from visionllm.model.word_tokens import colours_at
from visionllm.text_options import TextOptions
from visionllm.tokenizer import IMAGE, PADDING
from visionllm.train.text_loss import text_loss, written, written_loss

QUESTIONS = [
    Instruction("vqa", question="Which is larger, the red car or the dog?"),
    Instruction("vqa", question="Is there a cup?"),
]


@pytest.fixture(scope="module")
def network():
    return small_network(tasks=TASKS, word_layers=2)


@torch.no_grad()
def test_chances_and_gate_beside_a_float64_reference():
    torch.manual_seed(0)
    head = CopyHead(SMALL)
    torch.nn.init.normal_(head.gate.weight)
    states = torch.randn(2, 3, SMALL.llm_dim)
    source_states = torch.randn(2, 5, SMALL.llm_dim)
    ids = torch.tensor([[7, 8, 9, 8, 4], [3, 3, IMAGE, 5, PADDING]])
    last = torch.tensor([[1, 8, 9], [3, 1, 5]])
    mask = torch.rand(2, 3, 5) < 0.6
    mask[0, 2] = False
    source = CopySource(ids, mask[:, 0], head.keys(source_states))
    chances, gate = head(states, last, source, mask)
    for b in range(2):
        for t in range(3):
            query = head.query.weight.double() @ states[b, t].double()
            keys = source_states[b].double() @ head.key.weight.double().T
            scores = keys @ query / COPY_DIM**0.5
            for j in range(1, 5):
                if ids[b, j - 1] == last[b, t]:
                    scores[j] += float(head.follow)
            there = mask[b, t]
            wanted = torch.zeros(5, dtype=torch.float64)
            wanted[there] = scores[there].softmax(0)
            torch.testing.assert_close(chances[b, t].double(), wanted, atol=1e-6, rtol=1e-5)
            if there.any():
                torch.testing.assert_close(gate[b, t : t + 1], head.gate(states[b, t]))
    assert chances[0, 2].sum() == 0 and gate[0, 2].sigmoid() == 0
    alone, _ = head(states[:, :1], last[:, :1], source)
    torch.testing.assert_close(alone, chances[:, :1])


def test_mixed_chances_sum_to_one_and_give_the_loss():
    torch.manual_seed(0)
    logits, gate = torch.randn(4, 11), torch.tensor([-3.0, 0.0, 2.0, torch.finfo(torch.float32).min])
    ids = torch.tensor([[1, 2, 2, PADDING]] * 4)
    chances = torch.tensor([[0.5, 0.25, 0.25, 0.0]] * 3 + [[0.0] * 4])
    found = mixed(logits, chances, gate, ids)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(4))
    torch.testing.assert_close(found[3], logits[3].log_softmax(0))  # nothing to copy
    share = gate[1].sigmoid()
    expected = logits[1].softmax(0) * (1 - share)
    expected[1] += share * 0.5
    expected[2] += share * 0.5
    torch.testing.assert_close(found[1].exp(), expected)
    for piece in (2, 5):
        wanted = torch.full((4,), piece)
        written_alone = F.cross_entropy(logits, wanted, reduction="none")
        copied = (chances * (ids == piece)).sum(1)
        torch.testing.assert_close(mixed_loss(written_alone, copied, gate), -found[:, piece])


def test_images_class_tokens_and_padding_are_not_copied(network):
    tokenizer = network.tokenizer
    prompts = tokenizer.prompts([*QUESTIONS, Instruction("detection", ("dog",))], network.config.num_queries)
    mask = copyable(prompts.ids, tokenizer)
    for row in range(3):
        pieces = prompts.ids[row][mask[row]].tolist()
        assert IMAGE not in pieces and PADDING not in pieces and max(pieces) < tokenizer.vocab_size
    assert QUESTIONS[0].question in tokenizer.decode(prompts.ids[0][mask[0]].tolist())


@torch.no_grad()
def whole_pass(network, prefix, mask, ids, before, told=None):
    """Log-chances behind the pieces of one row, from a pass without cache: the prompt, then `before`.

    before: [(piece, whether it is asked)]; told: of a batch of one.
    """
    length = int(mask.sum())
    pieces = torch.tensor([piece for piece, _ in before])
    x = torch.cat([prefix[:length], network.embedding(pieces)])[None]
    there, slots = torch.ones(x.shape[:2]).bool(), x.new_zeros(1, 0, 1, x.shape[-1])
    states, _ = network.llm(x, there, slots, words=True, seen=told)
    eos = network.tokenizer.eos
    turns = [k for k, (piece, _) in enumerate(before) if piece == eos]
    if turns:  # a further question: what follows the last <eos>
        asked = torch.tensor([k > turns[-1] and is_asked for k, (_, is_asked) in enumerate(before)])
        source_mask = torch.cat([torch.zeros(length).bool(), asked])
    else:
        source_mask = torch.cat([copyable(ids[:length], network.tokenizer), torch.zeros(len(before)).bool()])
    source_ids = torch.cat([ids[:length], pieces])[None]
    source = CopySource(source_ids, source_mask[None], network.copy_head.keys(states))
    logits = network.text_head(states[:, -1], network.embedding.weight[: network.tokenizer.vocab_size])
    chances, gate = network.copy_head(states[:, -1:], pieces[None, -1:], source)
    return mixed(logits, chances[:, 0], gate[:, 0], source_ids)[0]


@torch.no_grad()
def test_training_reads_each_turn_beside_its_own_question(network):
    tokenizer = network.tokenizer
    prompts = tokenizer.prompts(QUESTIONS, network.config.num_queries)
    tokens = network.image_tokens(pictures(2), network.encode_text(prompts))
    prefix, mask = network.embed(prompts, tokens), prompts.ids != PADDING
    texts = ["dog", "yes"]
    turns = [[("Which is higher, the cup or the dog?", "cup")], []]
    with torch.no_grad():
        network.copy_head.gate.bias.fill_(0.5)
    total, weights = 0.0, 0.0
    for row, text in enumerate(texts):
        before = [(tokenizer.bos, False)]
        for number, (question, answer) in enumerate([(None, text), *turns[row]]):
            if number:
                before += [(tokenizer.eos, False), *((piece, True) for piece in tokenizer.encode(question))]
                before.append((tokenizer.bos, False))
            pieces = tokenizer.answer_ids(answer)[1:]
            for piece in pieces:
                found = whole_pass(network, prefix[row], mask[row], prompts.ids[row], before)
                total -= float(found[piece]) * len(pieces) ** -0.5
                weights += len(pieces) ** -0.5
                if piece != tokenizer.eos:
                    before.append((piece, False))
    given, wanted = written(network, texts, turns)
    loss, _ = written_loss(network, prefix, mask.sum(1), given, wanted, None, prompts.ids)
    assert float(loss) == pytest.approx(total / weights, abs=2e-5)
    without, _ = written_loss(network, prefix, mask.sum(1), given, wanted)
    assert abs(float(loss) - float(without)) > 1e-3


@torch.no_grad()
def test_writing_takes_the_likeliest_pieces_of_the_whole_pass(network):
    tokenizer = network.tokenizer
    network.copy_head.gate.bias.fill_(0.5)
    found = network.write(pictures(2), QUESTIONS, TextOptions(max_tokens=5))
    for row, text in enumerate(found):
        prompts = tokenizer.prompts(QUESTIONS[row : row + 1], network.config.num_queries)
        image = pictures(2)[row : row + 1]
        tokens = network.image_tokens(image, network.encode_text(prompts))
        told = told_of(network, prompts, tokens, colours_at(image, tokens.boxes[-1]))
        prefix, mask = network.embed(prompts, tokens)[0], (prompts.ids != PADDING)[0]
        before = [(tokenizer.bos, False)]
        for _ in range(5):
            piece = int(whole_pass(network, prefix, mask, prompts.ids[0], before, told).argmax())
            if piece == tokenizer.eos:
                break
            before.append((piece, False))
        assert text == tokenizer.decode([piece for piece, _ in before[1:]]).strip()


@pytest.mark.parametrize("options", [TextOptions(max_tokens=8), TextOptions(max_tokens=8, beams=3)])
def test_with_an_open_gate_every_word_is_of_the_question(options):
    network = small_network(tasks=TASKS, word_layers=2)
    with torch.no_grad():
        network.copy_head.gate.weight.zero_()
        network.copy_head.gate.bias.fill_(40.0)
    together = network.write(pictures(2), QUESTIONS, options)
    prompts = network.tokenizer.prompts(QUESTIONS, network.config.num_queries).ids
    for row, text in enumerate(together):
        asked = prompts[row][copyable(prompts[row], network.tokenizer)].tolist()
        pieces = {network.tokenizer.decode([piece]).strip() for piece in asked} - {""}
        left = text.replace(" ", "")
        for piece in sorted(pieces, key=len, reverse=True):
            left = left.replace(piece, "")
        assert text and not left
        # A batch's rows are kept apart, also when some of them end or beams change places.
        assert network.write(pictures(2)[row : row + 1], QUESTIONS[row : row + 1], options) == [text]


def test_the_copy_head_learns(network):
    loss = text_loss(network, text_batch("vqa"))["total"]
    loss.backward()
    for name, parameter in network.copy_head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_networks_without_layers_for_words_have_none():
    assert not hasattr(small_network(tasks=TASKS), "copy_head")
