"""What the commands do: each workflow takes plain arguments and returns a report; none of them prints."""
