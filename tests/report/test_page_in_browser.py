"""The report in a real Chromium: slider, hover, search, box, colours, themes, hostile texts, no network, size."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe as lp
from browser import Browser, is_installed
from planting import plant

pytestmark = pytest.mark.skipif(not is_installed(), reason="a real Chromium comes with the extra 'browser'")

LENGTHS = [3, 5, 1, 4, 7] * 6
ATTACK = (
    "<img src='https://example.com/x.png' onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
)
SETTLED = "document.getElementById('plane').dataset.layer === '{}'"
# Where a point is in the window; below it nothing else may lie.
PLACE = (
    "(() => {{ const b = scatter.canvas.getBoundingClientRect(), s = scatter.screen({}); "
    "return [b.left + s[0], b.top + s[1]] }})()"
)
INK = "[...scatter.context.getImageData(0, 0, scatter.canvas.width, scatter.canvas.height).data]"


def draw(seed: int, count: int = sum(LENGTHS)) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    fields = [{"label": ATTACK if one % 3 else "calm", "year": 1900 + one, ATTACK: one} for one in range(30)]
    layers = {name: draw(seed) for seed, name in enumerate(("embeddings", "layers.0", "layers.1"))}
    store = lp.open(plant(folder / "acts", layers, LENGTHS, fields=fields))
    lp.report(store, folder / "page.html", labels="label")
    return folder / "page.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser, page: Path) -> Browser:
    chromium.load(page)
    chromium.until(SETTLED.format(0))
    return chromium


def text_of(browser: Browser, name: str) -> str:
    return browser.run(f"document.getElementById('{name}').textContent")


def test_the_page_asks_for_nothing_and_complains_of_nothing(browser: Browser, page: Path) -> None:
    assert browser.requests == [page.resolve().as_uri()] and browser.console == []
    assert text_of(browser, "name") == "acts"


def test_the_policy_stops_what_the_page_does_not_do(browser: Browser) -> None:
    browser.run(
        "(window.failed = [], "
        "document.addEventListener('securitypolicyviolation', e => failed.push(e.violatedDirective)), 1)"
    )
    browser.run("(fetch('https://example.com/').catch(() => 0), new Image().src = 'https://example.com/a.png', 1)")
    browser.until("failed.length >= 2")
    assert {"connect-src", "img-src"} <= set(browser.run("failed"))
    # no string becomes markup or code
    assert (
        browser.run("(() => { try { document.body.innerHTML = '<b>'; return 'made' } catch (e) { return e.name } })()")
        == "TypeError"
    )
    assert browser.run("(() => { try { return eval('1') } catch (e) { return e.name } })()") == "EvalError"
    assert not [address for address in browser.requests if address.startswith("http")]


def test_hostile_texts_are_shown_and_do_not_run(browser: Browser) -> None:
    browser.hover(*browser.run(PLACE.format(1)))
    browser.until("!document.getElementById('tip').hidden")
    assert ATTACK[:60] in text_of(browser, "tip") and ATTACK[:60] in text_of(browser, "key")
    assert browser.run("document.querySelectorAll('main img, main script').length") == 0
    assert browser.run("document.title") == "acts: layerprobe report"
    assert browser.run("[...document.querySelectorAll('script')].length") == 2


def test_the_slider_moves_every_point_to_its_place_at_the_next_layer(browser: Browser) -> None:
    before = browser.run("[...scatter.now]")
    browser.run("(document.getElementById('layer').focus(), 1)")
    browser.press("Right")
    browser.until(SETTLED.format(1))
    assert text_of(browser, "layer-name").startswith("layers.0, ")
    places = browser.run("[...scatter.places]")
    assert browser.run("[...scatter.now]") == places[60:120] != before == places[:60]


def test_pointing_at_a_point_shows_its_text_at_every_layer(browser: Browser) -> None:
    data = json.loads(browser.run("document.getElementById('data').textContent"))
    browser.run("(scatter.goTo(2), 1)")
    browser.until(SETTLED.format(2))
    for number in (0, 17):
        x, y = browser.run(PLACE.format(number))
        browser.hover(x, y)
        under = f"...(([x, y]) => [{x} - x, {y} - y])((b => [b.left, b.top])(scatter.canvas.getBoundingClientRect()))"
        browser.until(f"scatter.hover === scatter.nearest({under})")
        shown = browser.run("scatter.hover")
        ordinal = data["points"]["ordinals"][data["points"]["of"][shown]]
        assert text_of(browser, "tip").startswith(f"text {ordinal}example{ordinal}")
    browser.hover(5, 5)
    browser.until("document.getElementById('tip').hidden")


def test_a_search_lights_what_it_finds_and_lists_it(browser: Browser) -> None:
    plain = browser.run(f"{INK}.reduce((sum, one) => sum + one, 0)")
    browser.run("(document.getElementById('search').focus(), 1)")
    browser.type("Text 2")
    browser.until("document.getElementById('chosen').children.length > 0")
    listed = browser.run("[...document.getElementById('chosen').children].map(one => one.textContent)")
    expected = [one for one in range(30) if str(one).startswith("2")]
    assert listed == [f"{one}text {one}" for one in expected]  # in the order of the input
    assert text_of(browser, "chosen-said") == "11 of 30 examples chosen."
    assert browser.run(f"{INK}.reduce((sum, one) => sum + one, 0)") != plain
    browser.run("(document.getElementById('clear').click(), 1)")
    assert browser.run(
        "[document.getElementById('chosen').children.length, document.getElementById('search').value]"
    ) == [0, ""]
    assert browser.run(f"{INK}.reduce((sum, one) => sum + one, 0)") == plain


def test_a_box_chooses_points_that_stay_chosen_at_another_layer(browser: Browser) -> None:
    box = browser.run(
        "(() => { const b = scatter.canvas.getBoundingClientRect(); return [b.left, b.top, b.width, b.height] })()"
    )
    left, top, width, height = box
    inside = [number for number in range(30) if browser.run(PLACE.format(number))[0] < left + width / 2]
    assert 0 < len(inside) < 30
    browser.drag(left + 2, top + 2, left + width / 2, top + height - 3)
    browser.until("scatter.brushed")
    assert browser.run("[...scatter.brushed].flatMap((one, number) => one ? [number] : [])") == inside
    browser.run("(scatter.goTo(1), 1)")
    browser.until(SETTLED.format(1))
    assert browser.run("[...scatter.brushed].flatMap((one, number) => one ? [number] : [])") == inside
    assert browser.run("document.getElementById('chosen').children.length") == len(inside)


def test_colours_follow_the_field(browser: Browser) -> None:
    names = browser.run("[...document.getElementById('colour').options].map(one => one.textContent)")
    assert names[0].startswith("<img") and names[1:] == ["label", "year", "norm"]
    data = json.loads(browser.run("document.getElementById('data').textContent"))
    for name in ("label", "year"):
        field = next(one for one in data["fields"] if one["name"] == name)
        place = names.index(name)
        browser.run(
            f"(() => {{ const s = document.getElementById('colour'); s.value = '{place}'; "
            "s.dispatchEvent(new Event('change')) })()"
        )
        looks = browser.run("[...scatter.looks]")
        if name == "label":
            assert looks == field["codes"]
            assert len(browser.run("[...document.getElementById('key').children].map(one => one.textContent)")) == 2
        else:
            ranked = [look for _, look in sorted(zip(field["numbers"], looks, strict=True))]
            assert ranked == sorted(ranked) and ranked[0] == 0 and ranked[-1] == 31


def test_curves_maps_and_scores_are_drawn(browser: Browser) -> None:
    assert browser.run("document.querySelectorAll('#curves svg').length") == 6
    assert browser.run("document.querySelectorAll('#heat svg rect').length") == 3 * 9
    rows = browser.run("[...document.querySelectorAll('#scores tbody tr')].map(row => row.children[0].textContent)")
    assert rows[:3] == ["embeddings", "layers.0", "layers.1"] and rows[-2:] == ["majority", "tfidf"]


# Of every drawing, and of the slider: texts whose boxes share more than the rim that no letter fills.
OVERLAPS = """(() => {
  const drawings = [...document.querySelectorAll('#curves svg, #heat svg')];
  const ticks = [...document.querySelectorAll('#ticks span')].filter(one => one.textContent);
  const boxes = [...drawings.map(svg => [...svg.querySelectorAll('text')]), ticks].map(
    texts => texts.map(text => {
      const range = document.createRange();
      range.selectNodeContents(text);
      return [text.textContent, range.getBoundingClientRect()];
    }));
  const meet = (a, b) => a.left < b.right && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom;
  return boxes.flatMap(of => of.flatMap(([text, a], at) =>
    of.slice(at + 1).filter(([_, b]) => meet(a, b)).map(([other]) => `${text} and ${other}`)));
})()"""
CUT = """[...document.querySelectorAll('#curves svg, #heat svg')].flatMap(svg => {
  const whole = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < whole.left - 1 || box.right > whole.right + 1;
  }).map(text => text.textContent);
})"""
STACKS = {
    "twelve": ["embeddings", *(f"layers.{layer}" for layer in range(12))],
    "forty": ["embeddings", *(f"layers.{layer}" for layer in range(40)), "norm"],
    "modules": [f"module:bert.encoder.layer.{layer}.attention.self.query:input" for layer in range(4)],
}


@pytest.mark.parametrize("stack", STACKS)
def test_no_name_or_number_of_a_drawing_runs_into_another_or_out_of_it(
    chromium: Browser, tmp_path: Path, stack: str
) -> None:
    sites = {name: draw(seed) for seed, name in enumerate(STACKS[stack])}
    page = lp.report(plant(tmp_path / "acts", sites, LENGTHS), tmp_path / "page.html", site=STACKS[stack])
    for width in (400, 700, 1400):
        chromium.load(page.path, width, 900)
        chromium.until(f"innerWidth === {width}")
        assert chromium.run(OVERLAPS) == chromium.run(CUT) == [], width
    about = "document.querySelector('#heat figcaption span').textContent"
    assert ("Dark blue is 1, yellow 0." in chromium.run(about)) == (len(sites) > 14)


def test_numbers_in_cells_say_zero_and_do_not_lose_a_sign(browser: Browser) -> None:
    for value, written in [(0, "0"), (-0.001, "0"), (1, "1"), (0.57, ".57"), (-0.03, "-.03"), (1.03, "1.03")]:
        assert browser.run(f"writeShare({value}, 60)") == written
    assert browser.run("writeShare(1.26, 20)") == "1.3"


def test_what_lies_beyond_the_ends_of_a_scale_is_said(browser: Browser) -> None:
    browser.run("(scatter.recolour(scatter.colours.find(one => one.name === 'year')), 1)")
    ends = browser.run("[...document.querySelectorAll('#key .ends span')].map(one => one.textContent)")
    assert ends == ["1900", "1928 and more"]


def test_points_are_drawn_in_no_order_of_the_store(browser: Browser) -> None:
    order = browser.run("[...scatter.order]")
    assert sorted(order) == list(range(30)) and order != sorted(order)
    assert browser.run("[...shuffle(30)]") == order  # the same page is the same picture


@pytest.mark.parametrize("is_dark", [False, True])
def test_light_and_dark_follow_the_system_until_the_button(page: Path, is_dark: bool) -> None:
    look = "[document.documentElement.dataset.theme, getComputedStyle(document.body).backgroundColor]"
    light, dark = ["light", "rgb(255, 255, 255)"], ["dark", "rgb(20, 23, 27)"]
    with Browser(is_dark) as browser:
        browser.load(page)
        assert browser.run(look) == (dark if is_dark else light)
        browser.run("(document.getElementById('theme').click(), 1)")
        assert browser.run(look) == (light if is_dark else dark)


@pytest.mark.parametrize("width", [420, 1400])
def test_nothing_is_wider_than_the_window(browser: Browser, page: Path, width: int) -> None:
    browser.load(page, width, 900)
    browser.until(f"innerWidth === {width}")
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_attention_shows_the_weight_under_the_pointer(tiny: Any, chromium: Browser, tmp_path: Path) -> None:
    texts = ["the quick fox", "the lazy dog", "the fox"]
    sites = ["layers.*", "layers.1.attention.weights"]
    store = lp.extract(tiny.model, texts, tmp_path / "acts", tokenizer=tiny.tokenizer, sites=sites)
    lp.report(store, tmp_path / "page.html")
    chromium.load(tmp_path / "page.html", 1400, 1000)
    chromium.run("(document.getElementById('heads').scrollIntoView({block: 'center'}), 1)")
    weights = store["layers.1.attention.weights"][0].float()
    tokens = store.example(0).tokens
    assert tokens is not None and chromium.run("document.querySelectorAll('#heads canvas').length") == len(weights)
    box = "(b => [b.left, b.top, b.width])(document.querySelectorAll('#heads canvas')[2].getBoundingClientRect())"
    left, top, width = chromium.run(box)
    step = width / len(tokens)
    chromium.hover(left + 3.5 * step, top + 1.5 * step)
    said = f"head 2: {tokens[1]} attends to {tokens[3]} with "
    chromium.until(f"document.getElementById('attention-said').textContent.startsWith({json.dumps(said)})")
    shown = float(text_of(chromium, "attention-said").removeprefix(said))
    assert shown == pytest.approx(float(weights[2, 1, 3]), abs=0.01)  # two decimals of a byte


def test_ten_thousand_points_are_a_small_page_that_is_drawn(chromium: Browser, tmp_path: Path) -> None:
    layers = {name: draw(seed, 10_000) for seed, name in enumerate(("embeddings", "layers.0", "layers.1"))}
    fields = [{"label": f"kind {one % 9}"} for one in range(10_000)]
    folder = plant(tmp_path / "acts", layers, [1] * 10_000, pool="mean", fields=fields)
    page = lp.report(folder, tmp_path / "page.html", max_rows=1000)
    assert page.num_points == 10_000 and page.path.stat().st_size == page.num_bytes < 15_000_000
    chromium.load(page.path)
    chromium.until(SETTLED.format(0))
    assert chromium.run("performance.getEntriesByName('drawn').length") == 1
    assert chromium.run(f"{INK}.filter((one, place) => place % 4 === 3 && one > 0).length") > 10_000
