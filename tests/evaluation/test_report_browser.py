"""The report in a real browser: what a reader sees and clicks."""

import re
import shutil

import pytest

from tests.evaluation import report_cases
from trl_kd.evaluation.report import write_report


selenium = pytest.importorskip("selenium", reason="selenium drives the browser")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs Chromium and chromedriver")


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # No sandbox: tests may run as root in a container
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def usual_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("usual") / "report.html"
    comparison = report_cases.usual()
    write_report(comparison, report_cases.usual_samples(comparison), path)
    return path


@pytest.fixture(scope="module")
def hostile_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "report.html"
    write_report(*report_cases.hostile(), path)
    return path


@pytest.fixture(scope="module")
def long_path(tmp_path_factory):
    """Names and words that no line of a phone holds."""
    path = tmp_path_factory.mktemp("long") / "report.html"
    comparison, word = report_cases.usual(), "a_word_without_an_end" * 5
    samples = report_cases.usual_samples(comparison, 2)
    for model in comparison.models:
        samples[f"{model.name}{word}"] = samples.pop(model.name)
        model.name, model.source = f"{model.name}{word}", word
    for sample in (sample for rows in samples.values() for sample in rows):
        sample.prompt, sample.references, sample.tokens[0] = word, [word], word
        sample.completion = "".join(sample.tokens[:-1])
    for change in comparison.models[2].changes.values():
        object.__setattr__(change, "against", comparison.models[1].name)
    comparison.title = comparison.dataset = word
    comparison.settings, comparison.versions = {word: word}, {word: word}
    write_report(comparison, samples, path)
    return path


def show(driver, path, width=1280, dark=False):
    """Open a page as it is first seen on a screen of this width."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(path.as_uri())
    driver.execute_script("try { localStorage.clear(); } catch {}")
    driver.get(path.as_uri())


@pytest.fixture
def usual(driver, usual_path):
    show(driver, usual_path)
    yield driver
    assert severe(driver) == []


def severe(driver):
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def text(driver, identifier):
    return driver.find_element(By.ID, identifier).text


def answers(driver):
    """Visible responses by the name of their model."""
    cards = driver.find_elements(By.CSS_SELECTOR, "#answers .answer")
    shown = [[card.find_element(By.CSS_SELECTOR, part).text for part in ("bdi", ".text")] for card in cards]
    return {name: response.strip() for name, response in shown}


def shown_number(text):
    """Two decimals of what the page rounded to three."""
    return float(re.search(r"total variation (\d\.\d\d)$", text)[1])


def by_divergence():
    samples = report_cases.usual_samples(report_cases.usual())

    def mean(index):
        values = samples["before"][index].divergence + samples["amm"][index].divergence
        return -sum(values) / len(values)

    return sorted(range(12), key=mean), samples


def test_browser_page_shows_its_parts_without_an_error(driver, usual_path):
    show(driver, usual_path)
    titles = [title.text for title in driver.find_elements(By.TAG_NAME, "h2")]
    assert titles == [
        *("Metrics", "Main metrics", "Training", "By position in the sequence", "Cost to serve"),
        *("Responses side by side", "How it was made"),
    ]
    assert report_cases.usual().sentences()[0] in text(driver, "summary")
    assert severe(driver) == []
    requests = driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert requests == []


def test_browser_next_and_previous_show_prompts_by_divergence(usual):
    order, samples = by_divergence()
    assert text(usual, "prompt") == samples["amm"][order[0]].prompt
    assert not usual.find_element(By.ID, "previous").is_enabled()
    usual.find_element(By.ID, "next").click()
    assert text(usual, "prompt") == samples["amm"][order[1]].prompt
    assert text(usual, "matches") == "2 of 12 prompts"
    assert text(usual, "prompt-title") == f"Prompt {order[1] + 1}"
    assert samples["amm"][order[1]].references[0].strip() in text(usual, "references")
    shown = answers(usual)
    assert list(shown) == ["teacher", "before", "amm"]
    assert shown["amm"] == samples["amm"][order[1]].completion.strip() + "<|endoftext|>"
    usual.find_element(By.ID, "previous").click()
    assert text(usual, "prompt") == samples["amm"][order[0]].prompt


def test_browser_order_of_the_dataset_starts_at_its_first_prompt_and_ends_at_its_last(usual):
    Select(usual.find_element(By.ID, "order")).select_by_value("dataset")
    assert text(usual, "prompt-title") == "Prompt 1"
    for _ in range(11):
        usual.find_element(By.ID, "next").click()
    assert text(usual, "prompt-title") == "Prompt 12"
    assert not usual.find_element(By.ID, "next").is_enabled()


def test_browser_pick_jumps_to_a_prompt(usual):
    order, _ = by_divergence()
    Select(usual.find_element(By.ID, "pick")).select_by_index(7)
    assert text(usual, "prompt-title") == f"Prompt {order[7] + 1}"
    assert text(usual, "matches") == "8 of 12 prompts"


def test_browser_filter_finds_prompts_and_responses(usual):
    box = usual.find_element(By.ID, "filter")
    box.send_keys("STORY 7:")
    assert text(usual, "prompt-title") == "Prompt 8"
    assert text(usual, "matches") == "1 of 1 that match, of 12 prompts"
    box.clear()
    _, samples = by_divergence()
    # Words of one response alone
    phrase = " ".join(samples["before"][4].completion.split()[3:9])
    box.send_keys(phrase)
    assert text(usual, "prompt-title") == "Prompt 5" and phrase in answers(usual)["before"]
    box.clear()
    box.send_keys("no such text")
    assert usual.find_element(By.ID, "nothing").is_displayed()
    assert not usual.find_element(By.ID, "shown").is_displayed()
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE)
    assert text(usual, "matches").endswith("of 12 prompts") and usual.find_element(By.ID, "shown").is_displayed()


def test_browser_models_can_be_hidden(usual):
    boxes = usual.find_elements(By.CSS_SELECTOR, "#columns input")
    boxes[1].click()
    assert list(answers(usual)) == ["teacher", "amm"]
    usual.find_element(By.ID, "next").click()
    assert list(answers(usual)) == ["teacher", "amm"]
    boxes[1].click()
    assert list(answers(usual)) == ["teacher", "before", "amm"]


def test_browser_tokens_are_coloured_by_divergence_and_colours_can_go(usual):
    order, samples = by_divergence()
    sample = samples["amm"][order[0]]
    card = usual.find_elements(By.CSS_SELECTOR, "#answers .answer")[2]
    tokens = card.find_elements(By.CLASS_NAME, "token")
    assert [token.get_attribute("textContent") for token in tokens] == sample.tokens
    bounds = [0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8]

    def alpha(token):
        colour = token.value_of_css_property("background-color")
        return float(colour.removesuffix(")").split(",")[3]) if colour.startswith("rgba") else 1.0

    for token, value in zip(tokens, sample.divergence, strict=True):
        level = sum(round(value, 3) >= bound for bound in bounds)
        assert f"h{level}" in token.get_attribute("class").split()
        assert shown_number(token.get_attribute("title")) == pytest.approx(value, abs=0.006)
    largest = max(range(len(tokens)), key=sample.divergence.__getitem__)
    smallest = min(range(len(tokens)), key=sample.divergence.__getitem__)
    assert alpha(tokens[largest]) > 0.2 and alpha(tokens[smallest]) == 0.0
    assert "special" in tokens[-1].get_attribute("class") and "special" not in tokens[0].get_attribute("class")
    usual.find_element(By.ID, "heat").click()
    assert {alpha(token) for token in tokens} == {0.0}
    assert not usual.find_element(By.ID, "scale").is_displayed()
    usual.find_element(By.ID, "heat").click()
    assert alpha(tokens[largest]) > 0.2


def test_browser_token_is_read_out_by_pointer_and_keys(usual):
    order, samples = by_divergence()
    sample = samples["amm"][order[0]]
    card = usual.find_elements(By.CSS_SELECTOR, "#answers .answer")[2]
    readout = card.find_element(By.CLASS_NAME, "readout")
    card.find_elements(By.CLASS_NAME, "token")[3].click()
    assert shown_number(readout.text) == pytest.approx(sample.divergence[3], abs=0.006)
    assert sample.tokens[3].strip() in readout.text
    card.find_element(By.CLASS_NAME, "text").send_keys(Keys.ARROW_RIGHT)
    assert shown_number(readout.text) == pytest.approx(sample.divergence[4], abs=0.006)
    assert sample.tokens[4].strip() in readout.text


def test_browser_theme_follows_the_system_and_the_button(driver, usual_path):
    def paper():
        return driver.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")

    show(driver, usual_path, dark=True)
    dark, button = paper(), driver.find_element(By.ID, "theme")
    assert button.text == "Light"
    button.click()
    light = paper()
    assert button.text == "Dark" and light != dark
    show(driver, usual_path)
    assert paper() == light
    driver.find_element(By.ID, "theme").click()
    assert paper() == dark
    assert severe(driver) == []


def test_browser_page_is_printed_in_light_colours_with_all_its_parts(driver, usual_path):
    show(driver, usual_path, dark=True)
    driver.execute_script("document.documentElement.dataset.theme = 'dark'")
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": [scheme]})
    body = driver.find_element(By.TAG_NAME, "body")
    assert body.value_of_css_property("background-color") == "rgba(255, 255, 255, 1)"
    assert sum(map(int, re.findall(r"\d+", body.value_of_css_property("color"))[:3])) < 150
    closed = "return document.querySelectorAll('details:not([open])').length"
    before = driver.execute_script(closed)
    driver.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert before > 0 and driver.execute_script(closed) == 0
    driver.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert driver.execute_script(closed) == before
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_browser_text_is_readable_in_light_and_dark(driver, usual_path):
    """Contrast of text and of tokens in the strongest colour, as WCAG 2 computes it."""
    script = """
    const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
    const over = (top, below) => {
      const alpha = top.length > 3 ? top[3] : 1;
      return [0, 1, 2].map((index) => top[index] * alpha + below[index] * (1 - alpha));
    };
    const light = (colour) => {
      const [r, g, b] = colour.map((value) => value / 255)
        .map((value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const contrast = (one, other) => {
      const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
      return (high + 0.05) / (low + 0.05);
    };
    document.querySelectorAll("details").forEach((element) => { element.open = true; });
    const paper = rgb(getComputedStyle(document.body).backgroundColor);
    const of = (selector, back) => {
      const found = getComputedStyle(document.querySelector(selector));
      const below = back ? over(rgb(found.backgroundColor), paper) : paper;
      return contrast(over(rgb(found.color), below), below);
    };
    const plain = ["#summary", ".note", "nav a", ".change", ".verdict.better", ".verdict.worse", ".verdict.same"];
    return [...plain.map((selector) => of(selector)), of("#steps .h7", true), of(".prompt h3")];
    """
    for dark in (False, True):
        show(driver, usual_path, dark=dark)
        assert min(driver.execute_script(script)) >= 4.5


@pytest.mark.parametrize("name", ["usual", "hostile", "long"])
def test_browser_page_fits_a_phone(driver, name, request):
    show(driver, request.getfixturevalue(f"{name}_path"), width=380)
    driver.execute_script("document.querySelectorAll('details').forEach((element) => { element.open = true; })")
    assert driver.execute_script("return innerWidth") == 380
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 380
    # Cards, one value below the other, rather than a table that scrolls
    assert driver.execute_script("return document.querySelector('#metrics .scroll').scrollWidth") <= 380
    heads = "return [...document.querySelectorAll('tbody th')].map((head) => head.getBoundingClientRect().width)"
    assert min(driver.execute_script(heads)) > 300
    small = "return [...document.querySelectorAll('svg.plot text')].map((e) => e.getBoundingClientRect().height)"
    assert min(height for height in driver.execute_script(small) if height) >= 9
    assert severe(driver) == []


def test_browser_hostile_texts_stay_text_and_run_nothing(driver, hostile_path):
    comparison, samples = report_cases.hostile()
    show(driver, hostile_path)
    Select(driver.find_element(By.ID, "order")).select_by_value("dataset")
    for index, text_of_model in enumerate(report_cases.HOSTILE):
        # Line separators are white space to a browser's `text`
        seen = driver.execute_script("return document.getElementById('shown').textContent")
        sample = samples[comparison.models[2].name][index]
        assert seen.count(text_of_model) >= 3 * 2 + 2
        assert sample.prompt in seen and sample.completion + sample.tokens[-1] in seen
        for token in driver.find_elements(By.CLASS_NAME, "token")[:1]:
            token.click()
        if index + 1 < len(report_cases.HOSTILE):
            driver.find_element(By.ID, "next").click()
    whole = driver.execute_script("return document.body.textContent")
    assert all(model.name in whole for model in comparison.models) and comparison.dataset in whole
    assert driver.execute_script("return typeof window.hacked") == "undefined"
    assert driver.execute_script("return document.querySelectorAll('img, svg[onload], [onmouseover]').length") == 0
    assert severe(driver) == []


def test_browser_policy_stops_a_script_that_gets_in(driver, usual_path, tmp_path):
    """Should text ever become markup, it still could not run."""
    path = tmp_path / "broken.html"
    attack = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
    path.write_text(usual_path.read_text().replace("<main>", f"<main>{attack}"))
    show(driver, path)
    assert driver.execute_script("return typeof window.hacked") == "undefined"
    assert len(severe(driver)) >= 2


def test_browser_page_without_divergence_offers_no_order_or_colours_of_it(driver, tmp_path):
    comparison = report_cases.usual()
    samples = report_cases.usual_samples(comparison, 3)
    for sample in (sample for rows in samples.values() for sample in rows):
        sample.divergence = None
    write_report(comparison, samples, tmp_path / "report.html")
    show(driver, tmp_path / "report.html")
    assert [option.text for option in Select(driver.find_element(By.ID, "order")).options] == ["dataset order"]
    assert not driver.find_element(By.ID, "heat").is_displayed()
    assert text(driver, "prompt-title") == "Prompt 1"
    assert severe(driver) == []
