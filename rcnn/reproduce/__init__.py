"""The paper's tables: which experiments they hold, how often each is trained, and how the outcome compares with the paper."""
