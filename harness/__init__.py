"""Expand, run, guard, time, store, analyse, judge."""
