"""The node under faults: real processes on real servers, with clients that check every byte."""
