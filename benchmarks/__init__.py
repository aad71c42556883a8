"""Measure w2vc, in its plain and its fast forms, beside another library and beside older versions of itself."""
