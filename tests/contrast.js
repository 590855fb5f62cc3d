// Texts of a page whose contrast against their background is below 4.5, each with that contrast.
const parts = (colour) => colour.match(/[\d.]+/g).map(Number);
const light = ([r, g, b]) => {
  const linear = [r, g, b].map((each) => each / 255).map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
};
const behind = (element) => {
  for (let each = element; each; each = each.parentElement) {
    const colour = parts(getComputedStyle(each).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const poor = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || ["SCRIPT", "STYLE", "NOSCRIPT", "OPTION", "title"].includes(element.tagName)) continue;
  const style = getComputedStyle(element);
  const colour = parts(element instanceof SVGElement ? style.fill : style.color);
  const [one, other] = [light(colour), light(behind(element))].sort((first, second) => second - first);
  const contrast = (one + 0.05) / (other + 0.05);
  if (contrast < 4.5) poor.push([walker.currentNode.textContent.slice(0, 40), contrast]);
}
return poor;
