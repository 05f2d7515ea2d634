"""Figures and the report page: pure functions from the files of a run to figures and HTML. No torch, no tracker."""
