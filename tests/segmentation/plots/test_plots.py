import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from rfield.segmentation import plots

PALETTE = np.zeros((256, 3), np.uint8)
PALETTE[:3] = (10, 20, 30), (200, 100, 0), (0, 0, 250)
GREY = [200, 200, 200]
MASK = np.array([[0, 1, 255], [2, 2, 1]], np.uint8)
IMAGE = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10

STEP = [0, 10, 20, 30]
DILATION = [14.0, 10.0, 7.0, 6.0]
FIELD = [436.0, 372.0, 324.0, 308.0]  # 212 + 16 d
LOSS = [2.0, 1.5, 1.2, 1.1]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def pixels(axes: Axes) -> npt.NDArray[np.uint8]:
    return np.asarray(axes.images[0].get_array())


def curve(axes: Axes, index: int = 0) -> list[list[float]]:
    return [np.asarray(data).tolist() for data in axes.lines[index].get_data()]


def test_colourise_takes_the_palette_and_greys_what_has_no_label() -> None:
    coloured = plots.colourise(MASK, PALETTE)
    assert coloured.dtype == np.uint8
    assert coloured.tolist() == [[[10, 20, 30], [200, 100, 0], GREY], [[0, 0, 250], [0, 0, 250], [200, 100, 0]]]
    assert plots.colourise(MASK, PALETTE.tolist()).tolist() == coloured.tolist()
    assert PALETTE[255].tolist() == [0, 0, 0]  # the caller's palette does not change


def test_overlay_mixes_by_hand_computed_shares_and_keeps_what_has_no_label() -> None:
    mixed = plots.overlay(IMAGE, MASK, PALETTE, opacity=0.25)
    assert mixed.dtype == np.uint8
    assert mixed[0, 0].tolist() == [2, 12, 22]  # 0.75 * (0, 10, 20) + 0.25 * (10, 20, 30) = (2.5, 12.5, 22.5), to even
    assert mixed[1, 0].tolist() == [68, 75, 145]  # 0.75 * (90, 100, 110) + 0.25 * (0, 0, 250) = (67.5, 75, 145)
    assert mixed[0, 2].tolist() == IMAGE[0, 2].tolist()
    assert plots.overlay(IMAGE, MASK, PALETTE, opacity=0).tolist() == IMAGE.tolist()
    full = plots.overlay(IMAGE, MASK, PALETTE, opacity=1)
    assert full[MASK < 255].tolist() == plots.colourise(MASK, PALETTE)[MASK < 255].tolist()


@pytest.mark.parametrize(
    ("mask", "palette", "message"),
    [
        (MASK.astype(np.int64), PALETTE, "a mask must be uint8"),
        (MASK[None], PALETTE, r"got uint8 \[1, 2, 3\]"),
        (MASK[:0], PALETTE, "a mask must be"),
        (MASK, PALETTE[:21], r"palette must be \[256, 3\]"),
        (MASK, PALETTE / 255, "whole numbers from 0 to 255, got float64"),
        (MASK, PALETTE.astype(int) - 1, "whole numbers from 0 to 255"),
    ],
)
def test_colourise_rejects_what_is_no_mask_or_palette(
    mask: npt.NDArray[np.uint8], palette: npt.ArrayLike, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plots.colourise(mask, palette)


def test_overlay_rejects_unequal_sizes_and_opacities_out_of_range() -> None:
    with pytest.raises(ValueError, match="got 2x3 and 1x3 px"):
        plots.overlay(IMAGE, MASK[:1], PALETTE)
    with pytest.raises(ValueError, match=r"permute\(1, 2, 0\)"):
        plots.overlay(np.zeros((3, 4, 5), np.uint8), MASK, PALETTE)
    for opacity in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="opacity must be from 0 to 1"):
            plots.overlay(IMAGE, MASK, PALETTE, opacity)


def test_panel_draws_every_picture_in_its_place_at_its_own_shape() -> None:
    portrait, portrait_mask = IMAGE.transpose(1, 0, 2), MASK.T.copy()
    columns = {"image": [IMAGE, portrait], "mask": [None, portrait_mask], "prediction": [MASK, portrait_mask]}
    figure = plots.panel(columns, PALETTE, ["road", "car", "boat"])
    assert [text.get_text() for text in figure.texts] == ["image", "mask", "prediction"]
    drawn = [IMAGE, MASK, portrait, portrait_mask, portrait_mask]
    wanted = [plots.colourise(picture, PALETTE) if picture.ndim == 2 else picture for picture in drawn]
    assert [pixels(axes).tolist() for axes in figure.axes] == [picture.tolist() for picture in wanted]
    first, prediction, below = (figure.axes[index].get_position() for index in (0, 1, 2))
    assert first.y0 == pytest.approx(prediction.y0)
    assert first.x1 < prediction.x0
    assert below.y1 < first.y0
    across, up = figure.get_size_inches()
    assert first.width * across / (first.height * up) == pytest.approx(3 / 2)


def test_panel_paints_no_prediction_where_there_is_no_true_label() -> None:
    truth = np.array([[1, 255, 0]], np.uint8)
    guess = np.array([[2, 2, 2]], np.uint8)
    figure = plots.panel({"ground truth": [truth, None], "before": [guess, guess]}, PALETTE)
    painted = [plots.colourise(mask, PALETTE).tolist() for mask in (truth, np.array([[2, 255, 2]], np.uint8), guess)]
    assert [pixels(axes).tolist() for axes in figure.axes] == painted
    assert all(axes.axison and axes.spines["left"].get_visible() for axes in figure.axes), "outlined"


def test_panel_s_legend_holds_the_classes_that_occur() -> None:
    figure = plots.panel({"a": [IMAGE], "b": [np.array([[2, 255]], np.uint8)]}, PALETTE, ["road", "car", "boat"])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["boat", "no label"]
    assert [to_hex(patch.get_facecolor()) for patch in legend.get_patches()] == ["#0000fa", "#c8c8c8"]
    unnamed = plots.panel({"b": [MASK]}, PALETTE).legends[0]
    assert [text.get_text() for text in unnamed.get_texts()] == ["0", "1", "2", "no label"]
    assert not plots.panel({"a": [IMAGE]}, PALETTE).legends


def test_panel_s_pictures_and_legend_stay_apart_and_inside() -> None:
    mask = np.arange(40, dtype=np.uint8).reshape(5, 8)
    figure = plots.panel({"a": [mask]}, PALETTE, [f"a rather long name {index}" for index in range(40)])
    figure.draw_without_rendering()
    legend, picture = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert figure.bbox.y0 <= legend.y0
    assert legend.y1 <= picture.y0
    assert figure.bbox.x0 <= legend.x0
    assert legend.x1 <= figure.bbox.x1


def test_panel_rejects_bad_input() -> None:
    for nothing in ({}, {"a": []}):
        with pytest.raises(ValueError, match="at least one picture"):
            plots.panel(nothing, PALETTE)
    with pytest.raises(ValueError, match=r"lengths are \{'a': 1, 'b': 2\}"):
        plots.panel({"a": [IMAGE], "b": [MASK, MASK]}, PALETTE)
    with pytest.raises(ValueError, match="a mask holds class 2, but the list has 2 class names"):
        plots.panel({"a": [MASK]}, PALETTE, ["road", "car"])
    with pytest.raises(ValueError, match="an image must be uint8"):
        plots.panel({"a": [IMAGE / 255]}, PALETTE)


def test_factor_curve_draws_the_data_and_names_start_end_and_best() -> None:
    figure = plots.factor_curve(STEP, DILATION, FIELD, LOSS, known_best=5.5)
    upper, lower = figure.axes
    assert curve(upper) == [STEP, DILATION]
    assert curve(upper, 1) == [[0, 30], [14, 6]]
    assert curve(upper, 2)[1] == [5.5, 5.5]
    assert curve(lower) == [STEP, LOSS]
    assert texts(upper) == ["first step  14  (436 px)", "end  6  (308 px)", "known best  5.5"]
    assert all(text.get_position()[1] > 1 for text in upper.texts), "above the axes, on no line"
    assert upper.get_xlim() == lower.get_xlim()
    low, high = upper.get_ylim()
    assert low < 5.5
    assert high > 14


def test_factor_curve_s_right_axis_is_the_receptive_field_of_the_left() -> None:
    figure = plots.factor_curve(STEP, DILATION, FIELD, LOSS)
    figure.draw_without_rendering()
    upper = figure.axes[0]
    (right,) = upper.child_axes
    assert right.get_ylabel() == "receptive field [px]"
    assert right.get_ylim() == pytest.approx([212 + 16 * bound for bound in upper.get_ylim()])


def test_a_constant_factor_has_one_receptive_field_on_the_right_axis() -> None:
    figure = plots.factor_curve(STEP, [6] * 4, [308] * 4, LOSS, known_best=12)
    figure.draw_without_rendering()
    upper = figure.axes[0]
    (right,) = upper.child_axes
    assert right.get_yticks().tolist() == [6]
    assert [label.get_text() for label in right.get_yticklabels()] == ["308"]
    assert upper.get_ylim()[1] > 12


def test_a_single_record_can_be_drawn() -> None:
    figure = plots.factor_curve([5], [6], [308], [1.5])
    figure.draw_without_rendering()
    assert texts(figure.axes[0]) == ["first step  6  (308 px)"]
    assert figure.axes[1].lines[0].get_marker() == "o"


def test_the_smoothed_loss_is_the_mean_of_the_finite_neighbours() -> None:
    loss = np.arange(80.0)
    loss[[40, 41]] = np.nan, np.inf
    raw, smooth = plots.factor_curve(np.arange(80), [6] * 80, [308] * 80, loss).axes[1].lines
    assert np.isnan(raw.get_ydata()).nonzero()[0].tolist() == [40, 41]
    assert smooth.get_label() == "mean of 5 records"
    expected = {0: 1.0, 10: 10.0, 40: (38 + 39 + 42) / 3, 79: 78.0}
    assert {index: smooth.get_ydata()[index] for index in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": [], "effective_dilation": [], "receptive_field_px": [], "loss": []}, "step must be a list"),
        ({"loss": LOSS[:3]}, "step and loss must have the same length, got 4 and 3"),
        ({"effective_dilation": [14, float("nan"), 7, 6]}, "effective_dilation must be finite, but 1 of 4"),
        ({"step": [0, 10, 5, 30]}, "step must rise, but it falls after 10"),
        ({"receptive_field_px": [436, 300, 324, 308]}, "affine function of effective_dilation"),
        ({"receptive_field_px": FIELD[::-1]}, "slope is -"),
        ({"effective_dilation": [6] * 4}, "slope is 0"),
        ({"known_best": 0.0}, "known_best must be"),
        ({"known_best": float("nan")}, "known_best must be"),
    ],
)
def test_factor_curve_rejects_bad_input(change: dict[str, object], message: str) -> None:
    good = {"step": STEP, "effective_dilation": DILATION, "receptive_field_px": FIELD, "loss": LOSS}
    with pytest.raises(ValueError, match=message):
        plots.factor_curve(**{**good, **change})


def test_learned_field_draws_centred_squares_to_scale_and_the_curve() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    fields = {"start": 30, "learned": 12, "known best": 10}
    figure = plots.learned_field(image, fields, [0, 5, 10], [30, 15, 12])
    left, right = figure.axes
    assert pixels(left).shape == image.shape
    assert left.images[0].get_extent() == [-30, 30, 20, -20]
    assert [(square.get_xy(), square.get_width(), square.get_height()) for square in left.patches] == [
        ((-side / 2, -side / 2), side, side) for side in fields.values()
    ]
    assert [line.get_ydata()[0] for line in right.lines[:3]] == list(fields.values())
    assert curve(right, 3) == [[0, 5, 10], [30, 15, 12]]
    assert texts(left) == texts(right) == ["start  30 px", "learned  12 px", "known best  10 px"]
    colours = [to_hex(square.get_edgecolor()) for square in left.patches]
    assert [to_hex(line.get_color()) for line in right.lines[:3]] == colours
    assert [to_hex(text.get_color()) for text in right.texts] == colours
    assert len(set(colours)) == 3


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (129, 129)])
@pytest.mark.parametrize("fields", [{"only": 1.0}, {"a": 400, "b": 90, "c": 88, "d": 3, "e": 3}])
def test_all_of_learned_field_lies_inside_the_figure_and_labels_do_not_collide(
    shape: tuple[int, int], fields: dict[str, float]
) -> None:
    figure = plots.learned_field(np.zeros((*shape, 3), np.uint8), fields, [0, 1], [9, 5])
    figure.draw_without_rendering()
    left, right = figure.axes
    canvas = left.get_window_extent()
    for artist in [*left.patches, *left.texts, *left.images]:
        box = artist.get_window_extent()
        assert canvas.x0 - 1 <= box.x0 <= box.x1 <= canvas.x1 + 1 or artist in left.texts
        assert canvas.y0 - 1 <= box.y0 <= box.y1 <= canvas.y1 + 1
    for axes in (left, right):
        boxes = [text.get_window_extent() for text in axes.texts]
        for index, box in enumerate(boxes):
            assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
            assert not any(box.overlaps(other) for other in boxes[:index])
    assert left.get_xlim()[1] >= max(*fields.values(), shape[1]) / 2


def test_learned_field_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match="an image must be"):
        plots.learned_field(MASK, {"start": 3}, [0], [3])
    with pytest.raises(ValueError, match="1 to 5 receptive fields, got 0"):
        plots.learned_field(IMAGE, {}, [0], [3])
    with pytest.raises(ValueError, match="1 to 5 receptive fields, got 6"):
        plots.learned_field(IMAGE, {str(index): 3 for index in range(6)}, [0], [3])
    with pytest.raises(ValueError, match="field 'start' must be above 0 px, got -1"):
        plots.learned_field(IMAGE, {"start": -1}, [0], [3])
    with pytest.raises(ValueError, match="the same length"):
        plots.learned_field(IMAGE, {"start": 3}, [0, 1], [3])


def test_save_writes_150_dots_an_inch_and_replaces_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    path.write_text("old")
    plots.save(Figure(figsize=(2, 1)), path)
    assert imread(path).shape == (150, 300, 4)
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    path.write_text("old")
    figure = Figure()
    figure.text(0, 0, "$\\nonsense$")
    with pytest.raises(ValueError, match="nonsense"):
        plots.save(figure, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"must end in \.png"):
        plots.save(figure, tmp_path / "figure.jpg")


def test_no_global_state_is_touched() -> None:
    code = "import sys, rfield.segmentation.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rf_curve_shows_values_means_spread_and_marks() -> None:
    curves = {"fixed": {2: [0.6, 0.7], 6.0: [0.8, 0.9], 24: [0.5, 0.5]}, "sampled": {6: [0.8]}}
    figure = plots.rf_curve(curves, "mIoU", {"best": 6}, field=(16, 212))
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    means = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert means["fixed"] == pytest.approx([0.65, 0.85, 0.5])
    assert means["sampled"] == [0.8]
    assert len(axes.collections) == 1, "a spread needs two values"
    assert [text.get_text() for text in axes.texts] == ["best  6"]
    # The mark's text stands above all values, and the legend beside the axes.
    low, high = axes.get_ylim()
    assert low + 0.925 * (high - low) > 0.9
    assert axes.get_legend().get_bbox_to_anchor().x0 > axes.bbox.x1
    assert [text.get_text() for text in axes.get_xticklabels()] == ["2", "6", "24"]
    (top,) = axes.child_axes
    assert [text.get_text() for text in top.get_xticklabels()] == ["244", "308", "596"]


def test_rf_curve_shows_standard_errors_as_bars() -> None:
    curves = {"step 5": {1: [0.5], 2: [0.4], 4: [0.6]}, "step 9": {1: [0.3], 2: [0.2]}}
    errors = {"step 5": {1: 0.1, 2: 0.0, 4: 0.05}, "step 9": {1: None, 2: None}}
    axes = plots.rf_curve(curves, "loss", errors=errors).axes[0]
    (bars,) = axes.containers
    assert [tuple(segment[:, 1]) for segment in bars.lines[2][0].get_segments()] == [
        pytest.approx(ends) for ends in ((0.4, 0.6), (0.4, 0.4), (0.55, 0.65))
    ]
    assert not plots.rf_curve(curves, "loss").axes[0].containers


@pytest.mark.parametrize(
    ("curves", "marked"),
    [
        ({}, {}),
        ({str(n): {1: [1.0]} for n in range(6)}, {}),
        ({"a": {}}, {}),
        ({"a": {1: []}}, {}),
        ({"a": {1: [np.nan]}}, {}),
        ({"a": {0: [1.0]}}, {}),
        ({"a": {1: [1.0]}}, {"best": 0}),
    ],
)
def test_rf_curve_refuses(curves: dict[str, dict[float, list[float]]], marked: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"curves can be drawn|finite values|above 0"):
        plots.rf_curve(curves, "loss", marked)


@pytest.mark.parametrize("runs", [{}, {"a": ([1, 2], [1.0])}, {"a": ([1], [0.0])}, {"a": ([2, 1], [1.0, 1.0])}])
def test_dilation_paths_refuse(runs: dict[str, tuple[list[int], list[float]]]) -> None:
    with pytest.raises(ValueError, match=r"1 to 5 runs|the same length|above 0|must rise"):
        plots.dilation_paths({"group": runs}, (16, 212))


def test_dilations_that_were_drawn_are_points_and_the_right_axis_is_in_px() -> None:
    figure = plots.dilation_paths({"": {"path 1": ([1, 2, 3, 4], [2, 8, 4, 4])}}, (16, 212), drawn_until=2)
    (axes,) = figure.axes
    drawn, line = axes.lines
    assert (drawn.get_linestyle(), list(drawn.get_ydata())) == ("None", [2, 8])
    assert (line.get_linestyle(), list(line.get_ydata()), line.get_label()) == ("-", [4, 4], "path 1")
    (right,) = axes.child_axes
    places = dict(zip(right.get_yticks(), right.get_yticklabels(), strict=True))
    labels = {float(place): text.get_text() for place, text in places.items()}
    assert labels == {2: "244", 3: "260", 4: "276", 6: "308", 8: "340"}
    curve = plots.factor_curve([1, 2, 3], [2, 8, 4], [244, 340, 276], [3.0, 2.0, 1.0], drawn_until=2).axes[0]
    assert [list(line.get_ydata()) for line in curve.lines] == [[2, 8], [4], [2, 4]]


def test_effective_fields_share_colours_scale_and_canvas() -> None:
    before, after = np.ones((20, 30)), np.full((20, 30), 5.0)
    after[0, 0] = 0.0
    figure = plots.effective_fields(
        {"before": (before, {"theoretical": (40, 40), "50 %": (7, 7)}), "after": (after, {"50 %": (9, 9)})}
    )
    left, right, bar = figure.axes
    assert [axes.get_title(loc="left") for axes in (left, right)] == ["before", "after"]
    assert left.get_xlim() == right.get_xlim() == pytest.approx((-20.8, 20.8))
    assert np.asarray(left.images[0].get_array()).max() == np.asarray(right.images[0].get_array()).max() == 1
    assert np.asarray(right.images[0].get_array()).min() == 1e-4
    assert [patch.get_bbox().bounds for patch in right.patches] == [(-4.5, -4.5, 9, 9)]
    assert to_hex(right.patches[0].get_edgecolor()) == to_hex(left.patches[1].get_edgecolor())
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["theoretical  40 px", "50 %  7 px"]
    assert bar.get_ylabel() == "contribution, relative to the largest"


@pytest.mark.parametrize(
    ("scores", "boxes", "message"),
    [
        (np.zeros((3, 3)), {}, "'x' must be"),
        (np.full((3, 3), np.nan), {}, "'x' must be"),
        (-np.ones((3, 3)), {}, "'x' must be"),
        (np.ones(3), {}, "'x' must be"),
        (np.ones((3, 3)), {str(side): (side, side) for side in range(6)}, "up to 5 boxes"),
    ],
)
def test_effective_fields_that_cannot_be_drawn(
    scores: npt.NDArray[np.float64], boxes: dict[str, tuple[float, float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plots.effective_fields({"x": (scores, boxes)})
    with pytest.raises(ValueError, match="1 to 3"):
        plots.effective_fields({})
