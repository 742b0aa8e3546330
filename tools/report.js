// Values under the pointer: each chart carries its points, each with what its place is called, and where they are drawn.
for (const chart of document.querySelectorAll('.chart')) {
  const { left, right, width, lo, hi, series } = JSON.parse(chart.dataset.chart);
  const svg = chart.querySelector('svg'), cursor = chart.querySelector('.cursor'), tip = chart.querySelector('.tip');
  const hide = () => { tip.style.display = 'none'; cursor.style.visibility = 'hidden'; };
  const nearest = (points, step) => {
    let a = 0, b = points.length - 1;
    while (b - a > 1) {
      const middle = (a + b) >> 1;
      if (points[middle][0] <= step) a = middle; else b = middle;
    }
    return step - points[a][0] <= points[b][0] - step ? points[a] : points[b];
  };
  chart.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) * width / box.width;
    if (at < left || at > right) return hide();
    const step = lo + (at - left) / (right - left) * (hi - lo);
    const found = series.map(s => ({ name: s.name, point: nearest(s.points, step) }));
    const shown = found[0].point[0];
    const x = left + (shown - lo) / (hi - lo || 1) * (right - left);
    const px = x / width * box.width;
    cursor.style.left = px + 'px';
    cursor.style.visibility = 'visible';
    tip.textContent = found.map(f => (f.name ? f.name + '  ' : '') + f.point[2] + '  ' + f.point[1]).join('\n');
    tip.style.display = 'block';
    tip.style.left = (px > box.width / 2 ? px - tip.offsetWidth - 10 : px + 10) + 'px';
  });
  chart.addEventListener('pointerleave', hide);
}
