import base64
import io
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from vision_ssl.encoders import resolve_encoder
from vision_ssl.extra.charts import Group, Line, interval_chart, line_chart, scatter, ticks
from vision_ssl.extra.glimpses import class_attention, map_similarity, principal_components, token_colours
from vision_ssl.extra.html import Markup, Section, data_table, facts, join, tag
from vision_ssl.extra.pictures import ACCENT, heat_map, picture, strength

IMAGES = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def build(name: str, size: int, **spec: Any) -> Any:
    """An encoder with random weights; Any, since type checkers do not see the parts of timm's modules."""
    torch.manual_seed(0)
    return resolve_encoder(name, image_size=size, **spec).build().eval()


def decoded(element: str) -> Image.Image:
    found = re.search(r'src="data:image/png;base64,([^"]+)"', element)
    assert found
    return Image.open(io.BytesIO(base64.b64decode(found[1])))


def test_text_is_escaped_once() -> None:
    assert tag("p", "a < b & 'c'") == "<p>a &lt; b &amp; &#x27;c&#x27;</p>"
    assert tag("p", tag("b", "<")) == "<p><b>&lt;</b></p>"
    assert tag("p", title='"><script>') == '<p title="&quot;&gt;&lt;script&gt;"></p>'
    assert isinstance(tag("p"), Markup)
    assert join([None, ["<", Markup("<")]]) == "&lt;<"


def test_attributes() -> None:
    element = tag("img", class_="a", aria_hidden="true", alt="", hidden=True, open=False, title=None, tabindex=0)
    assert element == '<img class="a" aria-hidden="true" alt="" hidden tabindex="0">'


def test_anchor_is_of_letters_and_digits() -> None:
    assert Section("What <it> sees: 2", "").anchor == "what-it-sees-2"


def test_columns_of_words() -> None:
    table = data_table("t", ("a", "b", "c"), [("1", "2", "3")], words=2)
    assert '<th scope="row">1</th><td class="word">2</td><td>3</td>' in table


def test_facts_of_plain_data() -> None:
    pairs = {"none": None, "yes": True, "float": 0.123456, "int": 12345, "list": [0.5, 1], "text": "<"}
    values = re.findall("<dd>(.*?)</dd>", facts(pairs.items()))
    assert values == ["-", "yes", "0.1235", "12,345", "0.5, 1", "&lt;"]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_enclose_and_are_round(low: float, span: float) -> None:
    high = low + span
    marks = ticks(low, high)
    step = marks[1] - marks[0]
    assert marks[0] <= low + 1e-6 * step
    assert marks[-1] >= high - 1e-6 * step
    assert 2 <= len(marks) <= 8
    assert np.allclose(np.diff(marks), step)


def test_ticks() -> None:
    assert ticks(0, 84) == [0, 20, 40, 60, 80, 100]
    assert ticks(0.41, 1.4) == [0.4, 0.6, 0.8, 1.0, 1.2, 1.4]
    assert ticks(3, 3)[0] < 3 < ticks(3, 3)[-1]


def test_line_chart_shows_its_points() -> None:
    line = Line("loss", np.array([0.0, 1.0]), np.array([2.0, 0.0]))
    chart = line_chart("title", [line], x_label="epoch", y_label="loss")
    assert 'd="M46.0 30.0L332.0 184.0"' in chart  # from the upper left of the axes to the lower right
    assert 'aria-label="title"' in chart


def test_long_lines_are_thinned_and_keep_their_ends() -> None:
    x = np.arange(5001.0)
    chart = line_chart("t", [Line("", x, x)], x_label="x", y_label="y")
    found = re.search(r'<path class="line" d="([^"]+)"', chart)
    assert found
    points = found[1][1:].split("L")
    assert len(points) == 300
    assert [points[0], points[-1]] == ["46.0 184.0", "332.0 30.0"]


def test_interval_chart_says_its_numbers() -> None:
    chart = interval_chart("linear", [("<a>", 50.0, 40.0, 60.0)], "accuracy (%)", highest=100)
    assert 'aria-label="linear: &lt;a&gt; 50.0 (40.0 to 60.0)"' in chart
    low, high = (float(number) for number in re.findall(r'd="M([\d.]+) \d+H([\d.]+)M', chart)[0])
    centre = float(re.findall(r'<circle cx="([\d.]+)"', chart)[0])
    assert centre == pytest.approx((low + high) / 2, abs=0.1)


def test_twenty_groups_look_different() -> None:
    groups = [Group(str(series), np.random.default_rng(series).normal(size=(1, 2)), series) for series in range(20)]
    chart = scatter("t", groups, x_label="x", y_label="y")
    key = re.findall(r'<path d="M5 5([^"]+)" fill="([^"]+)">', chart)
    assert len(set(key)) == len(key) == 20


def test_picture_is_what_it_was() -> None:
    pixels = torch.randint(256, (3, 20, 30), dtype=torch.uint8)
    image = decoded(picture(pixels, "noise"))
    assert image.size == (30, 20)
    assert np.array_equal(np.asarray(image), pixels.permute(1, 2, 0).numpy())
    gray = decoded(picture(pixels[:1].expand(3, -1, -1).float() / 255, "gray"))
    assert gray.mode == "L"
    assert np.array_equal(np.asarray(gray), pixels[0].numpy())
    assert decoded(picture(torch.zeros(3, 200, 100), "large")).size == (48, 96)
    assert 'alt="&lt;"' in picture(pixels, "<")


def test_heat_map_is_opaque_by_the_root_of_the_share() -> None:
    image = np.asarray(decoded(heat_map(torch.tensor([[0.0, 0.25], [1.0, 0.04]]), "alt")))
    assert image[..., 3].tolist() == [[0, 128], [255, 51]]
    assert (image[..., :3] == ACCENT).all()


def test_strength_goes_from_violet_to_yellow() -> None:
    colours = strength(torch.tensor([[1.0, 5.0], [1.0, 5.0]]), 64) * 255
    assert colours.shape == (3, 64, 64)
    assert colours[:, 32, 0].tolist() == pytest.approx([68, 1, 84], abs=1)
    assert colours[:, 32, -1].tolist() == pytest.approx([253, 231, 37], abs=1)
    assert strength(torch.ones(2, 2), 8).isfinite().all()


def test_class_attention_is_that_of_the_last_block() -> None:
    encoder = build("vit_tiny", 24, patch_size=8)
    inputs: list[Tensor] = []
    attention = encoder.blocks[-1].attn
    attention.fused_attn = True
    handle = attention.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    found = class_attention(encoder, IMAGES)
    handle.remove()
    with torch.inference_mode():
        query, key, _ = attention.qkv(inputs[0]).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhd,bhnd->bhn", query[:, :, 0], key) / query.shape[-1] ** 0.5
        expected = scores.softmax(dim=-1)[:, :, 1:].mean(dim=1).view(2, 3, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert attention.fused_attn is True
    assert not attention.attn_drop._forward_pre_hooks


def test_token_colours() -> None:
    encoder = build("vit_tiny", 24, patch_size=8)
    colours = token_colours(encoder, IMAGES)
    assert colours.shape == (2, 3, 3, 3)
    tokens = encoder.forward_features(IMAGES)[:, 1:].flatten(0, 1)
    first = principal_components(tokens, 1)[0][:, 0]
    low, high = first.quantile(0.02), first.quantile(0.98)
    expected = ((first - low) / (high - low)).clamp(0, 1).view(2, 3, 3)
    torch.testing.assert_close(colours[:, 0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("size", "stage"), [(24, 0), (64, 2)])
def test_similarity_is_of_the_last_map_that_is_fine(size: int, stage: int) -> None:
    encoder = build("resnet18", size, stem="7x7")
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        found = encoder.forward_intermediates(images, intermediates_only=True)[stage]
    mean = found.mean(dim=(2, 3))
    expected = torch.stack(
        [F.cosine_similarity(one.flatten(1).T, centre[None]) for one, centre in zip(found, mean, strict=True)]
    )
    torch.testing.assert_close(map_similarity(encoder, images), expected.view(2, *found.shape[2:]), rtol=0, atol=1e-5)
    assert found.shape[-1] >= 7


def test_principal_components_are_those_of_the_singular_vectors() -> None:
    features = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    projected, shares = principal_components(features, 3)
    centred = features - features.mean(dim=0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(projected.abs(), (left * values)[:, :3].abs(), rtol=0, atol=1e-9)
    torch.testing.assert_close(shares, (values**2 / (values**2).sum())[:3], rtol=0, atol=1e-12)
    torch.testing.assert_close(principal_components(features, 3)[0], projected, rtol=0, atol=0)
    assert principal_components(torch.ones(5, 4), 2)[1].isfinite().all()


def test_direction_of_a_component_is_fixed_by_its_largest_weight() -> None:
    features = torch.tensor([[-3.0, 1.0], [0.0, 0.0], [3.0, -1.0]])
    assert principal_components(features, 1)[0][:, 0].tolist() == pytest.approx([-(10**0.5), 0, 10**0.5])
