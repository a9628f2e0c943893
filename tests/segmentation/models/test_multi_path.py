import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rfield
from rfield.layers import ReceptiveFieldRegulator
from rfield.layers.dilation import set_dilation
from rfield.receptive_field.probe import probe_receptive_field
from rfield.receptive_field.theoretical import receptive_field_px, theoretical_receptive_field
from rfield.search import learned_layers
from rfield.segmentation.models import (
    HeadSpec,
    MultiPathHead,
    ParsingNetwork,
    SinglePathHead,
    build_head,
    build_model,
    small_cnn_backbone,
)
from rfield.segmentation.models.saving import describe_network, rebuild_network
from rfield.segmentation.training.fields import present_fields


def make(**options: object) -> MultiPathHead:
    torch.manual_seed(0)
    settings = {"dilation": 4, "head_channels": 8, "dropout": 0.0, "paths": 2} | options
    return MultiPathHead(6, 5, HeadSpec(**settings))


def same_weights(head: MultiPathHead) -> MultiPathHead:
    for path in head.paths[1:]:
        path.load_state_dict(head.paths[0].state_dict())
    return head


@pytest.mark.parametrize("mechanism", ["regulator", "dilation"])
def test_logits_are_the_sum_of_the_paths(mechanism: str) -> None:
    head = make(paths=3, mechanism=mechanism).eval()
    features = torch.randn(2, 6, 9, 7)
    expected = torch.stack([path(features, (33, 25)) for path in head.paths]).sum(0)
    assert torch.allclose(head(features, (33, 25)), expected, atol=1e-6)
    assert len(learned_layers(head)) == 3


def test_every_path_begins_with_batch_norm_and_has_its_own_weights() -> None:
    head = make()
    features = 7 * torch.randn(2, 6, 9, 7) + 3
    normal = (features - features.mean((0, 2, 3), keepdim=True)) / features.var((0, 2, 3), False, True).sqrt()
    torch.testing.assert_close(head(features), sum(path.layers(normal) for path in head.paths), rtol=1e-4, atol=1e-6)
    assert all(isinstance(path.chain()[0], torch.nn.BatchNorm2d) for path in head.paths)
    first, second = (path.layers.module.fc6.weight for path in head.paths)
    assert not torch.equal(first, second)


def test_shared_gradients_train_paths_as_one_kernel_would() -> None:
    head = MultiPathHead(6, 5, HeadSpec(head_channels=8, rates=(1, 3, "1x1"), norm=True, dropout=0.0))
    head.share_kernels()
    alone = copy.deepcopy(head.paths[0])
    optimizers = [torch.optim.AdamW(each.parameters(), 0.01) for each in (head, alone)]
    for step in range(3):
        features = torch.randn(2, 6, 9, 7, generator=torch.Generator().manual_seed(step))
        head(features).square().mean().backward()
        # The tied network: one set of weights at two dilations, each with a batch norm of its own.
        copies = [copy.deepcopy(path) for path in head.paths[:2]]
        (copies[0](features) + copies[1](features) + head.paths[2](features).detach()).square().mean().backward()
        for own, *grads in zip(alone.layers.parameters(), *(each.layers.parameters() for each in copies), strict=True):
            own.grad = grads[0].grad + grads[1].grad
        head.share_gradients()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for path in head.paths[:2]:
            for name, weight in path.layers.named_parameters():
                torch.testing.assert_close(weight, alone.layers.get_parameter(name), rtol=1e-3, atol=1e-5)
    assert not torch.equal(head.paths[0].norm.weight, head.paths[1].norm.weight)
    assert head.paths[2].layers.fc7.weight.shape == head.paths[0].layers.fc7.weight.shape
    assert not torch.equal(head.paths[2].layers.fc7.weight, head.paths[0].layers.fc7.weight)


@pytest.mark.parametrize("weight", [1.0, 5.0])
def test_equal_paths_with_equal_class_sets_stay_identical(weight: float) -> None:
    head = same_weights(make(class_groups=[[1, 2], [1, 2]], gradient_weight=weight))
    start = copy.deepcopy(head.state_dict())
    optimizer = torch.optim.Adam(head.parameters(), 0.01)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        features = torch.randn(2, 6, 9, 7, generator=generator)
        mask = torch.randint(0, 5, (2, 9, 7), generator=generator)
        F.cross_entropy(head(features, mask=mask), mask).backward()
        optimizer.step()
        optimizer.zero_grad()
    one, two = (path.state_dict() for path in head.paths)
    for key in one:
        assert torch.equal(one[key], two[key]), key
    assert any(not torch.equal(start[key], value) for key, value in head.state_dict().items())
    assert float(head.paths[0].factor_layer.factor) != 1.0


def test_published_guidance_weighs_each_paths_gradient_at_its_own_classes() -> None:
    head = make(class_groups=[[0], [1, 2]], gradient_weight=5.0)
    features, mask = torch.randn(2, 6, 9, 7), torch.randint(0, 5, (2, 9, 7))
    seen = []
    for path in head.paths:
        path.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output[0]))
    logits = head(features, mask=mask)
    F.cross_entropy(logits, mask).backward()
    plain = logits.detach().requires_grad_()
    F.cross_entropy(plain, mask).backward()
    second, first = seen
    for grad, classes in ((first, [0]), (second, [1, 2])):
        weights = torch.where(torch.isin(mask, torch.tensor(classes)), 5.0, 1.0)[:, None]
        assert torch.allclose(grad, plain.grad * weights, atol=1e-7)


def test_receptive_field_is_that_of_the_path_that_sees_farthest() -> None:
    head = make(paths=2)
    head.paths[1].factor_layer.set_factor(0.5)
    network = ParsingNetwork(small_cnn_backbone(), MultiPathHead(32, 5, HeadSpec(4, 8, paths=2)))
    network.head.paths[1].factor_layer.set_factor(0.5)
    assert theoretical_receptive_field(network) == pytest.approx((15 + 8 * 8, 15 + 8 * 8))
    assert head.effective_dilation == (8.0, 8.0)


def test_the_field_of_rectangular_paths_is_the_largest_along_each_axis() -> None:
    head = make(dilation=6, rectangular=True)
    for path, factor in zip(head.heads(), [(1.0, 6.0), (1.2, 0.75)], strict=True):
        path.factor_layer.set_factor(factor)
    # Dilations (6, 1) and (5, 8): fields of (13, 3) and (11, 17) feature px.
    assert theoretical_receptive_field(head) == pytest.approx((13, 17))
    assert head.effective_dilation == pytest.approx((6, 8))
    network = ParsingNetwork(small_cnn_backbone(), MultiPathHead(32, 5, HeadSpec(6, 8, paths=2, rectangular=True)))
    for path, factor in zip(network.head.heads(), [(1.0, 6.0), (1.2, 0.75)], strict=True):
        path.factor_layer.set_factor(factor)
    assert receptive_field_px(network) == pytest.approx((15 + 8 * 6, 15 + 8 * 8))
    assert [(field.path, field.axis, round(field.receptive_field_px)) for field in present_fields(network)] == [
        (0, 0, 15 + 8 * 6),
        (0, 1, 15 + 8 * 1),
        (1, 0, 15 + 8 * 5),
        (1, 1, 15 + 8 * 8),
    ]
    assert fields_of(rfield.fuse(with_whole_dilations(head))) == (13, 17)


def fields_of(head: nn.Module) -> tuple[float, float]:
    return probe_receptive_field(head, channels=6)


def with_whole_dilations(head: MultiPathHead) -> MultiPathHead:
    for path in head.heads():
        path.factor_layer.snap()
    return head


@pytest.mark.parametrize("weight", [1.0, 5.0])
def test_path_logits_are_root_mean_squares_of_the_last_training_forward(weight: float) -> None:
    head = make(class_groups=[[0], [1, 2]], gradient_weight=weight)
    features, mask = torch.randn(2, 6, 9, 7), torch.randint(0, 5, (2, 9, 7))
    head.eval()(features, mask=mask)
    assert head.path_logits is None, "of a training forward alone"
    head.train()
    logits = [path(features) for path in head.paths]
    head(features, mask=mask)
    if weight == 1.0:
        assert head.path_logits is None, "of the published guidance alone"
        return
    expected = [part.double().pow(2).mean().sqrt().item() for part in (*logits, logits[0] + logits[1])]
    assert head.path_logits.tolist() == pytest.approx(expected, rel=1e-5)
    assert not head.path_logits.requires_grad
    before = head.path_logits.clone()
    head.eval()(2 * features, mask=mask)
    assert torch.equal(head.path_logits, before), "a validation leaves them"


def test_guidance_ends_with_training() -> None:
    head = make(class_groups=[[0], [1, 2]], gradient_weight=5.0).eval()
    features, mask = torch.randn(2, 6, 9, 7), torch.randint(0, 5, (2, 9, 7))
    plain, guided = (
        torch.autograd.grad(head(features, mask=m).square().sum(), head.parameters()) for m in (None, mask)
    )
    assert all(torch.equal(*pair) for pair in zip(plain, guided, strict=True))


def test_aspp_is_deeplabs() -> None:
    """Parallel fc6 of rates 6, 12, 18, 24, each with fc7 and fc8, summed; no batch norm, nothing but the weights."""
    head = build_head(6, 5, HeadSpec(head_channels=8, dropout=0.25, rates=(6, 12, 18, 24)))
    layers = [path.layers for path in head.paths]
    assert [path.fc6.dilation for path in layers] == [path.fc6.padding for path in layers]
    assert [path.fc6.dilation for path in layers] == [(6, 6), (12, 12), (18, 18), (24, 24)]
    assert {path.fc6.out_channels for path in layers} == {8}
    assert {drop.p for drop in head.modules() if isinstance(drop, torch.nn.Dropout)} == {0.25}
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in head.modules())
    assert not learned_layers(head)
    # Of another mean and size than a batch norm would make of them.
    features = 7 * torch.randn(2, 6, 9, 7) + 3
    for mode in (False, True):
        head.train(mode)
        for drop in (module for module in head.modules() if isinstance(module, torch.nn.Dropout)):
            drop.eval()
        expected = sum(path.fc8(path.fc7(path.fc6(features).relu()).relu()) for path in layers)
        assert expected.std() > 0.01
        torch.testing.assert_close(head(features), expected, rtol=1e-5, atol=1e-7)


def test_build_head_builds_each_kind() -> None:
    sizes = HeadSpec(4, 8, 0.25, mechanism="dilation")
    assert isinstance(build_head(6, 5, sizes), SinglePathHead)
    assert len(build_head(6, 5, dataclasses.replace(sizes, paths=3)).paths) == 3
    rates = dataclasses.replace(sizes, rates=(2, 5))
    assert [path.dilation for path in build_head(6, 5, rates).paths] == [2, 5]
    for spec in (
        sizes,
        dataclasses.replace(sizes, paths=3),
        rates,
        dataclasses.replace(sizes, rectangular=True),
        dataclasses.replace(sizes, paths=2, rectangular=True),
    ):
        head = build_head(6, 5, spec)
        one = head.heads() if isinstance(head, MultiPathHead) else [head]
        for path in one:
            fc6 = path.layers.fc6
            assert (fc6.in_channels, fc6.out_channels, path.layers.drop6.p, path.layers.drop7.p) == (6, 8, 0.25, 0.25)
            assert len(learned_layers(path)) == (not spec.rates)
            assert spec.rates or path.factor_layer.log_factor.numel() == 1 + spec.rectangular


def test_guidance_is_that_of_the_spec() -> None:
    head = make(class_groups=((3, 1), (0,)), gradient_weight=3.0)
    assert isinstance(head, MultiPathHead)
    assert head.class_groups == ((1, 3), (0,))
    assert [(guide.classes, guide.weight) for guide in head.guidance] == [((1, 3), 3.0), ((0,), 3.0)]
    assert isinstance(head.paths[0].layers, ReceptiveFieldRegulator)
    for guidance in ({}, {"class_groups": ((3, 1), (0,))}, {"gradient_weight": 3.0}):
        assert len(make(**guidance).guidance) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": 1}, "2 to 255"),
        ({"paths": 256}, "1 to 255 paths, got 256"),
        ({"dilation": [2, 3, 4]}, "dilation must be a whole number"),
        ({"rates": (6,)}, "2 to 255, got 1"),
        ({"class_groups": [[0]]}, "as many class groups"),
        ({"class_groups": [[0], []]}, "a class group holds"),
        ({"class_groups": [[0], [5]]}, r"a class group holds classes from 0 to 4, got \[5\]"),
        ({"class_groups": [[0], [-1, 2]]}, r"got \[-1, 2\]"),
    ],
)
def test_bad_input(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_as_many_paths_as_there_are_labels() -> None:
    assert len(MultiPathHead(1, 2, HeadSpec(1, 1, paths=255, regulate=False)).paths) == 255


class TestLeavingPathsOut:
    @staticmethod
    def network() -> ParsingNetwork:
        network = build_model("small_cnn", 3, paths=3, dilation=2, mechanism="dilation")
        for dilation, path in zip((2, 5, 9), network.head.heads(), strict=True):
            path.factor_layer.set_factor(2 / dilation)
        return network.eval()

    @pytest.mark.parametrize("left_out", [[2], [0, 2]])
    def test_the_network_without_them_is_the_sum_of_the_rest_saved_and_rebuilt(self, left_out: list[int]) -> None:
        network, image = self.network(), torch.randn(1, 3, 33, 41)
        features = network.backbone(network.pad(image))
        rest = [path for index, path in enumerate(network.head.heads()) if index not in left_out]
        expected = sum(path(features, (33, 41)) for path in rest)
        network.head.leave_out(left_out)
        assert torch.allclose(network(image), expected, atol=1e-6)
        other = self.network()
        other.load_state_dict(network.state_dict())
        other.take_out_silent_paths()
        assert torch.allclose(other(image), expected, atol=1e-6)
        assert sum("fc6.weight" in name for name in other.state_dict()) == len(rest)
        rebuilt = rebuild_network(describe_network(other), Path("last.ckpt")).eval()
        rebuilt.load_state_dict(other.state_dict())
        assert torch.allclose(rebuilt(image), expected, atol=1e-6)
        assert rebuilt.head.effective_dilation == (5, 5)
        fused = rfield.fuse(other)
        fused_again = rebuild_network(describe_network(fused), Path("fused.json")).eval()
        fused_again.load_state_dict(fused.state_dict())
        assert torch.allclose(fused_again(image), expected, atol=1e-5)

    def test_a_plain_network_is_described_by_its_head_s_largest_dilation(self) -> None:
        network = self.network()
        conv = network.backbone.layers.conv3
        set_dilation(conv, (11, 11))
        described = describe_network(rfield.fuse(network))
        assert described["network"]["head"]["dilation"] == 9
        assert described["fused"] == {
            "dilations": {
                "backbone.layers.conv3": (11, 11),
                "head.paths.0.layers.fc6": (2, 2),
                "head.paths.1.layers.fc6": (5, 5),
            },
            "resizes": {},
        }

    def test_a_head_keeps_one_path_and_has_no_others(self) -> None:
        head = self.network().head
        head.leave_out([0])
        with pytest.raises(ValueError, match=r"at least one of the paths 0 to 2 must stay, got \[0, 1, 2\]"):
            head.leave_out([1, 2])
        with pytest.raises(ValueError, match=r"paths 0 to 2 must stay, got \[0, 3\]"):
            head.leave_out([3])
