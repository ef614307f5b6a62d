"""The Transformer against a plain rewrite, torch's own layers, and itself step by step."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_rectify.modules.translation import attention, transformer
from lightning_rectify.modules.translation.layers import DecoderLayer, EncoderLayer, LayerOptions, sinusoids
from lightning_rectify.modules.translation.transformer import Transformer
from lightning_rectify.text import BOS, EOS, PAD
from tests.reference import transformer as reference

SMALL = {"vocab_size": 23, "width": 16, "heads": 4, "feedforward": 24, "encoder_layers": 2, "decoder_layers": 3}


def build(seed=0, dtype=torch.float64, **options):
    """A small network in evaluation mode whose biases and norms are not at their start, where errors could hide."""
    torch.manual_seed(seed)
    network = Transformer(**{**SMALL, **options}).to(dtype).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return network


def sentences(lengths, generator, vocabulary=23, begin=False):
    """Rows of random tokens of these lengths, padded on the right."""
    rows = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = torch.randint(4, vocabulary, (length,), generator=generator)
        row[0 if begin else length - 1] = BOS if begin else EOS
    return rows


def pairs(seed=0, rows=5, source_vocabulary=23, target_vocabulary=23):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (2, rows), generator=generator).tolist()
    source = sentences(lengths[0], generator, source_vocabulary)
    return source, sentences(lengths[1], generator, target_vocabulary, begin=True), lengths


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# -- oracles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])  # off: torch's fused attention
@pytest.mark.parametrize(
    "options",
    [
        {"norm": "post"},
        {"norm": "pre"},
        {"norm": "post", "positions": "learned", "tied": False},
        {"norm": "pre", "target_vocab_size": 19},
    ],
    ids=str,
)
def test_network_is_the_papers(options, grad):
    """Float64 against numpy: sums in another order, far below 1e-10."""
    network = build(**options)
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    source, target, lengths = pairs(target_vocabulary=19)
    with torch.set_grad_enabled(grad):
        logits = network(source, target)
    looks = network.attention(source, target)
    assert logits.isfinite().all()
    assert logits.shape == (*target.shape, options.get("target_vocab_size", 23))
    assert looks.shape == (3, 5, 4, target.shape[1], source.shape[1])
    assert not looks.requires_grad
    for i, (s, t) in enumerate(zip(*lengths, strict=True)):
        expected, expected_looks = reference.transformer(
            weights, source[i, :s].tolist(), target[i, :t].tolist(), (2, 3), 4, options["norm"]
        )
        np.testing.assert_allclose(logits[i, :t].detach().numpy(), expected, rtol=0, atol=1e-10)
        np.testing.assert_allclose(looks[:, i, :, :t, :s].numpy(), expected_looks, rtol=0, atol=1e-10)
        assert not looks[:, i, :, :, s:].any()


def copied_attention(ours, theirs):
    """torch packs queries, keys and values in one matrix as well."""
    if isinstance(ours, attention.SelfAttention):
        weight, bias = ours.projection.weight, ours.projection.bias
    else:
        weight = torch.cat((ours.query.weight, ours.memory.weight))
        bias = torch.cat((ours.query.bias, ours.memory.bias))
    theirs.in_proj_weight.copy_(weight)
    theirs.in_proj_bias.copy_(bias)
    theirs.out_proj.load_state_dict(ours.output.state_dict())


@torch.no_grad()
def peer_of(layer, norm):
    decodes = isinstance(layer, DecoderLayer)
    peer = (nn.TransformerDecoderLayer if decodes else nn.TransformerEncoderLayer)(
        16, 4, 24, dropout=0.0, batch_first=True, norm_first=norm == "pre", dtype=torch.float64
    )
    copied_attention(layer.self_attention, peer.self_attn)
    residuals = [layer.self_residual, *([layer.cross_residual] if decodes else []), layer.feed_residual]
    if decodes:
        copied_attention(layer.cross_attention, peer.multihead_attn)
    for i, residual in enumerate(residuals, start=1):
        getattr(peer, f"norm{i}").load_state_dict(residual.norm.state_dict())
    peer.linear1.load_state_dict(layer.feedforward.inner.state_dict())
    peer.linear2.load_state_dict(layer.feedforward.outer.state_dict())
    return peer


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_layers_are_torchs(norm):
    torch.manual_seed(0)
    options = LayerOptions(16, 4, 24, 0.0, 0.0, 0.0, norm)
    encoder, decoder = EncoderLayer(options).double(), DecoderLayer(options).double()
    x, y = torch.randn(3, 6, 16).double(), torch.randn(3, 5, 16).double()
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    memory = encoder(x, mask[:, None, None])
    their_memory = peer_of(encoder, norm)(x, src_key_padding_mask=~mask)
    close(memory[mask], their_memory[mask])
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    theirs = peer_of(decoder, norm)(y, their_memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=~mask)
    close(decoder(y, memory, mask), theirs)


def test_sinusoids_have_the_papers_numbers():
    encoding = sinusoids(3, 5, 6, torch.device("cpu"), torch.float64)
    for row, place in zip(encoding, (3, 4), strict=True):
        angles = [place / 10000 ** (2 * i / 6) for i in range(3)]
        close(row, torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64))
    half = sinusoids(1000, 1001, 6, torch.device("cpu"), torch.bfloat16)  # 1000 is no bfloat16 number's neighbour
    close(half, sinusoids(1000, 1001, 6, torch.device("cpu"), torch.float32).bfloat16())


def test_initialisation_is_fairseqs():
    torch.manual_seed(0)
    network = Transformer(4000, width=64, heads=4, feedforward=256, encoder_layers=1, decoder_layers=1)
    embedding = network.output_weight
    assert not embedding[PAD].any()
    # 256,000 normal draws: the standard deviation is known to 0.14 %; the bar is five of these
    assert embedding[1:].std().item() == pytest.approx(64**-0.5, rel=0.007)
    bounds = {"projection": 4 * 64, "query": 4 * 64, "memory": 4 * 64, "output": 2 * 64, "inner": 320, "outer": 320}
    seen = set()
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            kind = name.rsplit(".", 1)[1]
            seen.add(kind)
            bound = (6 / bounds[kind]) ** 0.5
            largest = module.weight.abs().max().item()
            assert 0.99 * bound < largest <= bound  # of 4096 draws or more none above .99: probability 1e-18
            assert not module.bias.any()
    assert seen == set(bounds)


@pytest.mark.parametrize(
    ("options", "matrices"),
    [
        ({}, [(8000, 1)]),
        ({"tied": False}, [(8000, 3)]),
        ({"target_vocab_size": 500}, [(8000, 1), (500, 1)]),
        ({"target_vocab_size": 500, "tied": False}, [(8000, 1), (500, 2)]),
        ({"norm": "pre", "positions": "learned", "max_length": 50}, [(8000, 1), (50, 2), (2, 2)]),  # two norms more
    ],
)
def test_number_of_parameters(options, matrices):
    d, f = 256, 1024
    feed, attend, norm = 2 * d * f + d + f, 4 * d * d + 4 * d, 2 * d
    layers = 3 * (attend + feed + 2 * norm) + 3 * (2 * attend + feed + 3 * norm)
    network = Transformer(8000, **options)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == layers + sum(rows * times * d for rows, times in matrices)
    if not options:
        assert count == 7_577_600


def test_number_of_parameters_of_the_papers_shape():
    with torch.device("meta"):
        network = Transformer(8000, width=512, heads=4, feedforward=1024, encoder_layers=6, decoder_layers=6)
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(35.6e6, rel=0.002)


def test_tied_weights_are_one_parameter_also_after_a_copy_and_a_load():
    network = build()
    for each in (network, copy.deepcopy(network)):
        assert each.encoder.embedding.tokens.weight is each.decoder.embedding.tokens.weight is each.output_weight
    other = build(seed=1)
    other.load_state_dict(network.state_dict())
    assert other.output_weight is other.encoder.embedding.tokens.weight
    source, target, _ = pairs()
    assert torch.equal(network(source, target), other(source, target))
    untied = build(tied=False)
    assert len({id(w) for w in (untied.output_weight, *[e.embedding.tokens.weight for e in untied.children()])}) == 3


# -- padding and order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_padding_changes_nothing(seed, norm):
    """Values and gradients of a padded batch are those of its sentences one by one."""
    network = build(seed, norm=norm)
    source, target, lengths = pairs(seed)
    picks = torch.randn(*target.shape, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    real = target != PAD
    logits = network(source, target)
    assert logits.isfinite().all()
    (logits * picks)[real].sum().backward()
    together = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    for i, (s, t) in enumerate(zip(*lengths, strict=True)):
        alone = network(source[i : i + 1, :s], target[i : i + 1, :t])
        close(alone[0], logits[i, :t])
        (alone[0] * picks[i, :t]).sum().backward()
    for parameter, grad in zip(network.parameters(), together, strict=True):
        close(parameter.grad, grad, 1e-10)  # sums over up to 40 positions, gradients of up to 100


@pytest.mark.parametrize("grad", [True, False])
def test_no_token_sees_a_later_one(grad):
    network = build()
    source, target, _ = pairs(seed=3)
    changed = target.clone()
    changed[:, 3:] = 5
    assert not torch.equal(changed, target)
    with torch.set_grad_enabled(grad):
        before, after = network(source, target), network(source, changed)
    close(before[:, :3], after[:, :3])
    assert (before[:, 3:] - after[:, 3:]).abs().max() > 0.01


# -- step by step ------------------------------------------------------------------------------------------------------


def stepped(network, state, target):
    return torch.stack([network.step(tokens, state) for tokens in target.unbind(1)], dim=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("options", [{}, {"norm": "pre", "positions": "learned", "target_vocab_size": 23}], ids=str)
def test_steps_are_the_whole_forward_pass(options, dtype, tolerance):
    """Logits are of order 1, so the bars are some ten to a hundred epsilon of each type."""
    network = build(dtype=dtype, **options)
    source, target, _ = pairs()
    expected = network(source, target).detach()
    state = network.start(source)
    assert len(state) == 5
    logits = stepped(network, state, target)
    assert state.length == target.shape[1]
    assert not logits.requires_grad
    close(logits, expected, tolerance)


def test_steps_in_bfloat16_autocast_are_near_the_whole_forward_pass():
    network = build(dtype=torch.float32)
    source, target, _ = pairs()
    with torch.autocast("cpu", torch.bfloat16):
        logits = stepped(network, network.start(source), target)
    error = (logits.float() - network(source, target).detach()).square().mean().sqrt().item()
    assert (
        error < 0.05
    )  # logits of order 1 to 4 behind some fifteen products rounded to 2^-9; 1 if the cache were wrong


def test_states_repeat_and_select_rows():
    """Rows leave, come twice, swap within their source and across sources: each goes on as if it had been alone."""
    network = build()
    source, _, _ = pairs(rows=4)
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(4)
    written = torch.empty(4, 0, dtype=torch.int64)
    state = network.start(source)

    def go(steps):
        nonlocal written
        for _ in range(steps):
            tokens = torch.randint(4, 23, (len(owner),), generator=generator)
            written = torch.cat((written, tokens[:, None]), dim=1)
            close(network.step(tokens, state), network(source[owner], written)[:, -1].detach())

    def select(rows):
        nonlocal owner, written
        rows = torch.tensor(rows, dtype=torch.int64)
        state.select(rows)
        owner, written = owner[rows], written[rows]
        assert len(state) == len(owner)

    go(1)
    state.repeat(3)
    owner, written = owner.repeat_interleave(3), written.repeat_interleave(3, dim=0)
    go(2)
    select([2, 0, 0, 3, 4, 5, 8, 7, 6, 9, 11, 11])  # beams change places: the sources' keys stay where they are
    assert (state.group, len(state.mask)) == (3, 4)
    go(1)
    select([9, 10, 9, 3, 4, 5])  # two sources are done, two change places
    assert (state.group, len(state.mask)) == (3, 2)
    go(1)
    state.repeat(2)
    owner, written = owner.repeat_interleave(2), written.repeat_interleave(2, dim=0)
    go(1)
    select([0, 7, 3, 11, 10, 1])  # no order at all
    assert state.group == 1
    go(1)
    select([5, 5, 0, 2])
    go(1)
    select([])
    assert len(state) == 0


def test_a_state_repeats_at_least_once():
    state = build().start(pairs()[0])
    with pytest.raises(ValueError, match=r"^Expected argument `times` to be at least 1 but got 0"):
        state.repeat(0)


# -- dropout, low precision, export, compilation -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "activation_dropout"])
@pytest.mark.parametrize("grad", [True, False])
def test_each_dropout_drops_while_training_only(name, grad):
    network = build(**{"dropout": 0.0, name: 0.5})
    source, target, _ = pairs()
    with torch.set_grad_enabled(grad):
        expected = network(source, target)
        network.train()
        assert not torch.equal(network(source, target), network(source, target))
        network.eval()
        assert torch.equal(network(source, target), expected)


def test_dropped_attention_has_the_undropped_mean():
    torch.manual_seed(0)
    query, key, value = torch.rand(3, 1, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    mean = torch.stack([attention.attend(query, key, value, dropout=0.3) for _ in range(4000)]).mean(0)
    # values below 1, four weights near 1/4: a draw's deviation is below .35, that of the mean below .006; five of these
    close(mean, attention.attend(query, key, value), 0.03)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_bfloat16_autocast_is_no_worse_than_torchs_own_layers(norm, grad):
    torch.manual_seed(0)
    layer = DecoderLayer(LayerOptions(16, 4, 24, 0.0, 0.0, 0.0, norm))
    peer = peer_of(layer.double(), norm).float()
    layer = layer.float()
    x, memory = torch.randn(8, 12, 16), torch.randn(8, 9, 16)
    mask = torch.ones(8, 9, dtype=torch.bool)
    exact = copy.deepcopy(layer).double()(x.double(), memory.double(), mask)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        ours = layer(x, memory, mask)
        causal = nn.Transformer.generate_square_subsequent_mask(12)
        theirs = peer(x, memory, tgt_mask=causal, tgt_is_causal=True)
    assert ours.dtype == torch.float32  # the residual stream is never rounded to bfloat16
    error, peers_error = ((out.double() - exact).square().mean().sqrt().item() for out in (ours, theirs))
    assert error < 0.01  # features of order 1 and six rounded products, each off by about 2^-9
    assert error < 1.25 * peers_error


@pytest.mark.parametrize("grad", [True, False])
def test_export_with_a_dynamic_batch(grad):
    network = build(dtype=torch.float32, encoder_layers=1, decoder_layers=1)
    source, target, _ = pairs(rows=3)
    batch = torch.export.Dim("batch", min=1, max=64)
    length, width = torch.export.Dim("target_length", min=2, max=64), torch.export.Dim("source_length", min=2, max=64)
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(
            network, (source, target), dynamic_shapes=({0: batch, 1: width}, {0: batch, 1: length})
        ).module()
        for rows, seed in ((1, 5), (3, 0), (7, 1)):
            source, target, _ = pairs(seed, rows)
            close(exported(source, target), network(source, target), 1e-5)  # perhaps sums in another order


def test_compiled_halves_train_alike():
    plain, compiled = (build(dropout=0.0, encoder_layers=1, decoder_layers=1) for _ in range(2))
    compiled.encoder.compile(backend="aot_eager")
    compiled.decoder.compile(backend="aot_eager")
    losses = {}
    for name, network in (("plain", plain), ("compiled", compiled)):
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        losses[name] = []
        for seed in range(3):
            source, target, _ = pairs(seed)
            logits = network(source, target[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.detach())
    close(torch.stack(losses["compiled"]), torch.stack(losses["plain"]), 1e-10)  # float64
    source, target, _ = pairs()
    compiled.eval()
    close(stepped(compiled, compiled.start(source), target), compiled(source, target).detach())
    assert plain.state_dict().keys() == compiled.state_dict().keys()


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 3}, "`vocab_size` to be at least 4 but got 3"),
        ({"target_vocab_size": 0}, "`target_vocab_size` to be at least 4 but got 0"),
        ({"heads": 0}, "`heads` to be at least 1 but got 0"),
        ({"feedforward": 0}, "`feedforward` to be at least 1 but got 0"),
        ({"encoder_layers": 0}, "`encoder_layers` to be at least 1 but got 0"),
        ({"decoder_layers": 0}, "`decoder_layers` to be at least 1 but got 0"),
        ({"max_length": 0}, "`max_length` to be at least 1 but got 0"),
        ({"dropout": 1.0}, "`dropout` to be in .0, 1. but got 1.0"),
        ({"attention_dropout": -0.1}, "`attention_dropout` to be in .0, 1. but got -0.1"),
        ({"activation_dropout": 2}, "`activation_dropout` to be in .0, 1. but got 2"),
        ({"width": 18}, "`width` to be even and a multiple of the number of `heads`, 4, but got 18"),
        ({"width": 15, "heads": 3}, "`width` to be even and a multiple of the number of `heads`, 3, but got 15"),
        ({"norm": "batch"}, "`norm` to be 'post' or 'pre' but got 'batch'"),
        ({"positions": "rotary"}, "`positions` to be 'sinusoidal' or 'learned' but got 'rotary'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=f"^Expected argument {message}"):
        Transformer(**{**SMALL, **options})


def test_learned_positions_end():
    network = build(positions="learned", max_length=4)
    network(torch.full((1, 4), EOS), torch.full((1, 4), BOS))
    with pytest.raises(ValueError, match="at most 4 tokens, the `max_length` of the learned positions, but got 5"):
        network(torch.full((1, 5), EOS), torch.full((1, 1), BOS))
    state = network.start(torch.full((1, 1), EOS))
    for _ in range(4):
        network.step(torch.tensor([BOS]), state)
    with pytest.raises(ValueError, match="but got 5"):
        network.step(torch.tensor([BOS]), state)


def test_both_halves_are_what_is_trained():
    assert {name for name, _ in build().named_children()} == {"encoder", "decoder"}
    assert transformer.PAD == 0  # what nn.Embedding and the masks take for padding is the data's
