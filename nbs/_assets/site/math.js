// Formulas arrive as \( ... \) and \[ ... \]; `document$` fires again on every page that instant navigation swaps in.
document$.subscribe(({ body }) =>
  renderMathInElement(body, {
    delimiters: [
      { left: "\\(", right: "\\)", display: false },
      { left: "\\[", right: "\\]", display: true },
    ],
  })
);
