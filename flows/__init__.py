"""The Prefect flow: the only place that knows Prefect. It calls `rcnn`; nothing in `rcnn` but the command line calls it."""
