"""What the tests ask of an open report: what it logged, drew, holds and says at the pointer."""

from __future__ import annotations

import itertools
import json

# Bokeh draws in shadow trees: everything below `root`, through them.
DEEP = """const deep = (root) => [...root.querySelectorAll("*")].flatMap(
  (node) => [node, ...(node.shadowRoot ? deep(node.shadowRoot) : [])]);"""


def logged(page):
    """Console messages, and the addresses that pages on disk requested, since the browser started."""
    page.console += page.get_log("browser")
    for entry in page.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        # The browser's own first tab requests chrome:// addresses; they are not the report's.
        asked = message["method"] == "Network.requestWillBeSent"
        if asked and message["params"]["documentURL"].startswith("file:"):
            page.requests.append(message["params"]["request"]["url"])
    return page.console, page.requests


def canvases(page, figure):
    """(width, height, number of colours among sampled pixels) of every canvas of a figure."""
    return page.execute_script(
        DEEP
        + """const nodes = deep(document.getElementById(arguments[0]));
        return nodes.filter((node) => node.tagName === "CANVAS").map((canvas) => {
          const box = canvas.getBoundingClientRect();
          const copy = document.createElement("canvas");
          copy.width = canvas.width; copy.height = canvas.height;
          const context = copy.getContext("2d");
          context.drawImage(canvas, 0, 0);
          const pixels = new Uint32Array(context.getImageData(0, 0, copy.width, copy.height).data.buffer);
          return [box.width, box.height, new Set(pixels).size];
        });""",
        f"figure-{figure}",
    )


TOOLTIPS = (
    DEEP
    + """const shown = (node) => node.classList.contains("bk-Tooltip") && node.getBoundingClientRect().height;
    const said = (node) => !node.children.length && node.tagName !== "STYLE";
    return deep(document.body).filter(shown).flatMap((node) => deep(node.shadowRoot).filter(said))
      .map((node) => node.textContent).join(" ")"""
)


def point_at(page, figure, across, down):
    """Move the pointer to a fraction of a figure's first canvas; the text of the tooltips that show."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    nudges = itertools.cycle((0, -0.1, 0.1))

    def text_after_moving(driver):
        # Moved anew at every look, and a little up and down: a page may not listen yet, and Bokeh's releases
        # differ by some pixels in where a bar ends.
        box = driver.execute_script(
            DEEP
            + """const nodes = deep(document.getElementById(arguments[0]));
            const canvas = nodes.find((node) => node.tagName === "CANVAS");
            canvas.scrollIntoView({block: "center"});
            const box = canvas.getBoundingClientRect();
            return [box.left, box.top, box.width, box.height];""",
            f"figure-{figure}",
        )
        x, y = round(box[0] + across * box[2]), round(box[1] + (down + next(nudges)) * box[3])
        move = ActionChains(driver)
        move.w3c_actions.pointer_action.move_to_location(x - 3, y)
        move.w3c_actions.pointer_action.move_to_location(x, y)
        move.perform()
        return driver.execute_script(TOOLTIPS)

    return WebDriverWait(page, 60).until(text_after_moving)


def point_at_color(page, figure, color, size=8):
    """Move the pointer onto a square of `size` device pixels of one colour; the text of the tooltips."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    wanted = [int(color[place : place + 2], 16) for place in (1, 3, 5)]
    page.execute_script("document.getElementById(arguments[0]).scrollIntoView()", f"figure-{figure}")

    def text_after_moving(driver):
        place = driver.execute_script(
            DEEP
            + """const [id, [red, green, blue], size] = arguments;
            const found = deep(document.getElementById(id)).filter((node) => node.tagName === "CANVAS");
            for (const canvas of found) {
              const { width, height } = canvas;
              if (!width || !height) continue;
              const copy = new OffscreenCanvas(width, height).getContext("2d");
              copy.drawImage(canvas, 0, 0);
              const { data } = copy.getImageData(0, 0, width, height);
              const is = (x, y) => {
                const [r, g, b, a] = data.subarray(4 * (y * width + x));
                const off = Math.max(Math.abs(r - red), Math.abs(g - green), Math.abs(b - blue));
                return off <= 3 && a > 250;
              };
              for (let y = 0; y + size < height; y += 2) for (let x = 0; x + size < width; x += 2) {
                let all = true;
                for (let k = 0; all && k < size * size; k++) {
                  all = is(x + (k % size), y + Math.floor(k / size));
                }
                if (!all) continue;
                const box = canvas.getBoundingClientRect();
                const [half, scale] = [size / 2, box.width / width];
                const across = Math.round(box.left + (x + half) * scale);
                const down = Math.round(box.top + (y + half) * scale);
                if (down < 5 || down > window.innerHeight - 5) continue;
                return [across, down];
              }
            }""",
            f"figure-{figure}",
            wanted,
            size,
        )
        if place is None:
            return None
        move = ActionChains(driver)
        move.w3c_actions.pointer_action.move_to_location(max(place[0] - 30, 0), place[1])
        move.w3c_actions.pointer_action.move_to_location(*place)
        move.perform()
        return driver.execute_script(TOOLTIPS)

    return WebDriverWait(page, 60).until(text_after_moving)


def sources_of(page, figure):
    """The columns of every source that the page fills in a figure, by block and fill."""
    return page.execute_script(
        """const figure = document.getElementById(arguments[0]);
        return [...figure.querySelectorAll(".block")].flatMap((block) => {
          const { item, fills } = JSON.parse(document.getElementById(block.dataset.block).textContent);
          const doc = Bokeh.documents.find((each) => each.get_model_by_id(item.root_id));
          const columns = (id) => Object.fromEntries(
            Object.entries(doc.get_model_by_id(id).data).map(([name, values]) => [name, [...values]]));
          return fills.map((fill) => ({ ...fill, columns: columns(fill.source) }));
        });""",
        f"figure-{figure}",
    )
