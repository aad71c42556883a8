"""Pictures and pages that show what a model does: attention, codevectors, traces, views."""
