"""fastlora in other libraries' places; each module imports what it is for."""
