// Package credentials reads a registry's credentials from files that users have: USER:PASSWORD, and Docker's config.json.
// They are never arguments, which every process of the machine can read, and no credential helper is run.
package credentials
