"""`rcnn compare`: the models of a storage side by side, and what differs between two of them."""
