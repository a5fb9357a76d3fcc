"""What of a page cannot be read or does not fit, found by the browser itself."""

from __future__ import annotations

from tests.browser.lab import Lab

CONTRAST = 4.5
"""Of text against what is behind it: level AA of WCAG 2.2, 1.4.3."""
OUTPUT = ".jp-Notebook .jp-OutputArea-output"

FAINT = """
([selector, least]) => {
  const channels = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = channels(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0.5) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll(`${selector} *`)) {
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent.trim()).join(" ").trim();
    if (!text || e.disabled || !e.checkVisibility()) continue;
    const [a, b] = [channels(getComputedStyle(e).color), behind(e)].map(luminance).sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < least) found.push(`${text.slice(0, 60)}: ${ratio.toFixed(2)}`);
  }
  return found;
}
"""
WIDE = """
selector => [...document.querySelectorAll(selector), ...document.querySelectorAll(`${selector} *`)]
  .filter(e => e.checkVisibility() && e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1
    && getComputedStyle(e).overflowX !== "visible" && getComputedStyle(e).display !== "inline")
  .map(e => `${e.tagName} ${e.className}: ${e.scrollWidth} > ${e.clientWidth}: ${e.textContent.trim().slice(0, 60)}`)
"""


def faint(lab: Lab) -> list[str]:
    """Texts of outputs with too little contrast."""
    return list(lab.page.evaluate(FAINT, [OUTPUT, CONTRAST]))


def overflowing(lab: Lab) -> list[str]:
    """Elements of outputs whose content is cut off or needs a bar to scroll sideways."""
    return list(lab.page.evaluate(WIDE, OUTPUT))
