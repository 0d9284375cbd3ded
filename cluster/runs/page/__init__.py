"""One HTML page about a run, which needs nothing but itself: a record in, text out.

curves.py numbers to few points and round ticks · chart.py points to SVG · panels.py which charts there are
trials.py a sweep · results.py what the tables and tiles show · render.py page.html, style.css and script.js filled in
"""
