"""The node under faults: real processes on real servers, hurt on purpose, with clients that check every byte."""
