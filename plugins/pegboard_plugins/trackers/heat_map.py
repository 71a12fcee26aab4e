"""A heat map of expert load over layers and steps: one HTML file that needs nothing else.

Every logged step's table becomes one byte per cell on a logarithmic scale; when there are too many
steps, every other one is dropped, so the file stays small whatever the length of the run. The file
is its own store: a run that goes on reads back what it had drawn.

N rows (layers), M columns (experts).
"""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pegboard.contracts import Table

__all__ = ["HeatMapFile", "load_bytes", "load_colours"]

_MAX_STEPS = 512
_MARK = '<script type="application/json" id="data">'


class HeatMapFile:
    """Draws one table of each logged step.

    Args:
        path: the HTML file; read first if it exists.
        table: name of the table, such as `expert_load`.
        every_s: shortest time between two writings, in seconds; the last is never lost to a clean
            end.
    """

    def __init__(self, path: Path, *, table: str, every_s: float) -> None:
        self._path, self._table, self._every_s = path, table, every_s
        self._rows: tuple[str, ...] = ()
        self._steps: dict[int, np.ndarray] = {}
        self._written_at = -math.inf
        self._changed = False
        self._read_back()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers are other trackers' business."""

    def log_tables(self, step: int, tables: Mapping[str, Table]) -> None:
        """Keep this step's table, if it has one."""
        table = tables.get(self._table)
        if table is None:
            return
        if table.row_names != self._rows:
            self._rows, self._steps = table.row_names, {}
        # A run that was resumed takes its steps again.
        self._steps = {s: cells for s, cells in self._steps.items() if s < step}
        self._steps[step] = load_bytes(np.asarray(table.values, dtype=np.float64))
        if len(self._steps) > _MAX_STEPS:
            self._steps = dict(list(self._steps.items())[::2])
        self._changed = True
        if time.monotonic() - self._written_at >= self._every_s:
            self._write()

    def close(self) -> None:
        """Write what waits; further calls do nothing."""
        if self._changed:
            self._write()

    def _write(self) -> None:
        cells_SNM = np.stack(list(self._steps.values()))
        data = {
            "table": self._table,
            "rows": self._rows,
            "columns": cells_SNM.shape[2],
            "steps": list(self._steps),
            "cells": base64.b64encode(cells_SNM.tobytes()).decode(),
        }
        text = _PAGE.replace("DATA", _MARK + json.dumps(data) + "</script>")
        temporary = self._path.with_suffix(".html.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self._path)
        self._written_at, self._changed = time.monotonic(), False

    def _read_back(self) -> None:
        if not self._path.is_file():
            return
        text = self._path.read_text(encoding="utf-8")
        try:
            begin = text.index(_MARK) + len(_MARK)
            data: dict[str, Any] = json.loads(text[begin : text.index("</script>", begin)])
            shape = (len(data["steps"]), len(data["rows"]), data["columns"])
            cells_SNM = np.frombuffer(base64.b64decode(data["cells"]), np.uint8).reshape(shape)
            self._rows = tuple(data["rows"])
            self._steps = dict(zip(data["steps"], cells_SNM, strict=True))
        except (ValueError, KeyError):
            return  # not ours: it is written over


def load_bytes(load_NM: np.ndarray) -> np.ndarray:
    """(N, M) load over mean load -> uint8: 0 for none, else 128 + 16 * log2(load), clipped."""
    with np.errstate(divide="ignore"):
        scaled = np.round(128 + 16 * np.log2(load_NM))
    return np.where(load_NM > 0, np.clip(scaled, 1, 255), 0).astype(np.uint8)


def load_colours(cells_NM: np.ndarray) -> np.ndarray:
    """(N, M) of `load_bytes` -> (N, M, 3) uint8 RGB: white at the mean, red above, blue below,
    black for none. Saturates at 16 times and a 16th of the mean."""
    away = np.clip((cells_NM.astype(np.float64) - 128) / 64, -1, 1)[..., None]
    hot, cold = np.array([178, 24, 43.0]), np.array([33, 102, 172.0])
    target = np.where(away > 0, hot, cold)
    colours = 255 + (target - 255) * np.abs(away)
    return np.where(cells_NM[..., None] == 0, 0, colours).astype(np.uint8)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Expert load</title>
<style>
body{font:14px system-ui,sans-serif;margin:1.5em;color:#222;background:#fff}
canvas{image-rendering:pixelated;border:1px solid #999;cursor:crosshair;display:block}
h2{font-size:1em;margin:1.4em 0 .4em} #say{min-height:1.4em} input{width:24em}
</style></head><body>
<h1 style="font-size:1.2em">Load of the experts</h1>
<p>White: the mean load. Red: more, full red at 16 times. Blue: less. Black: no token at all.</p>
<p>Step <input id="step" type="range" min="0"> <b id="stepname"></b>
Layer <input id="layer" type="range" min="0"> <b id="layername"></b></p>
<p id="say"></p>
<h2>Layers over steps: the most loaded expert of each layer</h2><canvas id="over"></canvas>
<h2>This step: layers down, experts across</h2><canvas id="atstep"></canvas>
<h2>This layer: experts down, steps across</h2><canvas id="atlayer"></canvas>
DATA
<script>
const d=JSON.parse(document.getElementById('data').textContent),S=d.steps.length,N=d.rows.length,
M=d.columns,c=Uint8Array.from(atob(d.cells),x=>x.charCodeAt(0)),at=(s,n,m)=>c[(s*N+n)*M+m];
function colour(v){if(!v)return[0,0,0];const a=Math.max(-1,Math.min(1,(v-128)/64)),
t=a>0?[178,24,43]:[33,102,172];return t.map(x=>255+(x-255)*Math.abs(a))}
function peak(s,n){let v=0;for(let m=0;m<M;m++)v=Math.max(v,at(s,n,m));return v}
function draw(id,w,h,get,name){const e=document.getElementById(id);e.width=w;e.height=h;
const g=e.getContext('2d'),p=g.createImageData(w,h);
for(let y=0;y<h;y++)for(let x=0;x<w;x++){const k=4*(y*w+x);p.data.set([...colour(get(x,y)),255],k)}
g.putImageData(p,0,0);e.style.width=Math.max(w,Math.min(1100,w*14))+'px';
e.style.height=Math.max(h,Math.min(500,h*14))+'px';
e.onmousemove=v=>{const r=e.getBoundingClientRect(),x=Math.min(w-1,Math.floor((v.clientX-r.left)/r.width*w)),
y=Math.min(h-1,Math.floor((v.clientY-r.top)/r.height*h)),b=get(x,y);
say.textContent=name(x,y)+': '+(b?(2**((b-128)/16)).toFixed(2)+' of the mean load':'no token')}}
const step=document.getElementById('step'),layer=document.getElementById('layer'),
say=document.getElementById('say');
step.max=S-1;step.value=S-1;layer.max=N-1;layer.value=0;
function all(){const s=+step.value,n=+layer.value;
document.getElementById('stepname').textContent=d.steps[s];
document.getElementById('layername').textContent=d.rows[n];
draw('atstep',M,N,(x,y)=>at(s,y,x),(x,y)=>d.rows[y]+', expert '+x);
draw('atlayer',S,M,(x,y)=>at(x,n,y),(x,y)=>'step '+d.steps[x]+', expert '+y)}
draw('over',S,N,(x,y)=>peak(x,y),(x,y)=>'step '+d.steps[x]+', '+d.rows[y]+', most loaded');
document.getElementById('over').onclick=v=>{const r=v.target.getBoundingClientRect();
step.value=Math.floor((v.clientX-r.left)/r.width*S);layer.value=Math.floor((v.clientY-r.top)/r.height*N);all()};
step.oninput=layer.oninput=all;all();
</script></body></html>
"""
