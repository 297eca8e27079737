"""fastlora."""
