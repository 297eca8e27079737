"""fastlora inside other libraries. Each is imported when it is used, never by ``import fastlora``."""
