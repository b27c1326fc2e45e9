"""The console command `distributor`."""
