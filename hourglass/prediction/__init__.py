"""Predictions on images and videos that are not a data set's: read, drawn and written."""
