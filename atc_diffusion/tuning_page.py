"""What `tune` found as a self-contained page; needs Jinja and Matplotlib."""

import base64
import io
from collections.abc import Mapping
from math import isfinite

import jinja2
import matplotlib
from matplotlib.figure import Figure
from PIL.Image import Image

from atc_diffusion.tuning import Tuning

TEMPLATE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which setting?</title>
<style>
  body { margin: 0 auto; padding: 2rem 1.25rem; max-width: 60rem; color: #1c2330;
         font: 16px/1.55 system-ui, sans-serif; }
  pre { background: #f6f7f9; padding: .8rem 1rem; border-radius: 6px; white-space: pre-wrap; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { text-align: right; border-bottom: 1px solid #e3e6eb; padding: .35rem .9rem .35rem 0; }
  th:first-child, td:first-child { text-align: left; }
  .best { font-weight: 600; }
  .images { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
  figure { margin: 0; }
  figure img { width: 100%; border-radius: 6px; }
  figcaption, dl, p { font-size: .88rem; color: #5d6675; }
  svg { width: 100%; height: auto; margin-top: 1.5rem; }
</style>
<h1>Which setting?</h1>
<dl>{% for name, value in conditions.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
<pre>{{ tuning.advice }}</pre>
<h2>Time and fidelity</h2>
<p>Median seconds per call, the median ratio to the unpatched call for the same prompt, and the mean PSNR to its images.
Settings that were slower than the unpatched model or far from its images were drawn for the first prompt only.
{{ tuning.note }}</p>
<table>
<tr><th>setting</th><th>prompts</th><th>seconds</th><th>ratio</th><th>PSNR, dB</th></tr>
{% for row in tuning.rows %}
<tr{% if row is sameas tuning.best %} class="best"{% endif %}><td>{{ row.setting }}</td><td>{{ row.num_prompts }}</td>
<td>{{ "%.2f" % row.seconds }}</td><td>{{ "%.2f" % row.ratio }}</td><td>{{ "%.1f" % row.psnr }}</td></tr>
{% endfor %}
</table>
{{ plot | safe }}
<h2>The first prompt</h2>
<div class="images">
{% for row in tuning.rows if row.image %}
<figure><img src="{{ row.image | data_uri }}" alt="{{ row.setting }}">
<figcaption>{{ row.setting }}, {{ "%.2f" % row.ratio }} of the time, {{ "%.1f" % row.psnr }} dB</figcaption></figure>
{% endfor %}
</div>
</html>
"""


def make_page(tuning: Tuning, conditions: Mapping[str, str]) -> str:
    """The page as HTML, which loads nothing else; `conditions` are what the figures hold under, by name."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["data_uri"] = data_uri
    return environment.from_string(TEMPLATE).render(tuning=tuning, conditions=conditions, plot=plot(tuning))


def plot(tuning: Tuning) -> str:
    """PSNR against time, as an SVG element."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for row in tuning.rows:
        if isfinite(row.psnr):  # not the unpatched pipeline's
            axes.plot(row.ratio, row.psnr, "o", label=str(row.setting))
    axes.axvline(1, color="grey", linestyle="--", label="unpatched")
    axes.axhline(tuning.min_psnr, color="lightgrey", label=f"{tuning.min_psnr:g} dB")
    axes.set(xlabel="time, relative to the unpatched pipeline", ylabel="PSNR to the unpatched images (dB)")
    figure.legend(loc="outside right upper", fontsize=7)
    return svg(figure)


def svg(figure: Figure) -> str:
    """`figure` as an SVG element, with text as text and the same in every run."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "atc_diffusion"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()[file.getvalue().index("<svg") :]


def data_uri(image: Image) -> str:
    """`image` as the address of a PNG that is part of the page."""
    file = io.BytesIO()
    image.save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
