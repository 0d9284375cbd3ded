"""How good a model is: its predictions over evaluation data in, metrics and tables out.

exact.py sums that come out the same however data are cut · text.py perplexity, bits per byte, token accuracy
classes.py accuracy, macro-F1, per-class table · calibration.py · preference.py pairs of answers
labels.py the data's labels in the model's numbers · requirements.py whether metrics are good enough to publish
"""
