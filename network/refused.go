package network

import (
	"context"
	"encoding/json"
	"slices"
)

// A plugin that cannot read its configuration refuses ADD, and DEL for ever after: what would be owed to the pod could never be
// paid. It has made nothing: so its DEL is passed over, where the intent says that its ADD with the same configuration was
// refused, and the other plugins of the chain have theirs. Of programs it is not known what they have made before they refuse.

// refusals is what is known of plugins that refuse a pod's configuration: told at ADD, asked at DEL.
type refusals struct {
	add []string
	del func(typ string) bool
}

type refusalsKey struct{}

func withRefusals(ctx context.Context, r *refusals) context.Context {
	return context.WithValue(ctx, refusalsKey{}, r)
}

// settled is asked about a plugin that refuses its configuration: whether this command need not be tried again.
func settled(ctx context.Context, typ, command string) bool {
	r, _ := ctx.Value(refusalsKey{}).(*refusals)
	switch {
	case r == nil:
	case command == "ADD":
		r.add = append(r.add, typ)
	case command == "DEL" && r.del != nil:
		return r.del(typ)
	}
	return false
}

// noteRefused adds to a pod's intent which plugins have refused. Without it DEL is owed.
func (m *Manager) noteRefused(id string, types []string) {
	i, ok := m.intended(id)
	if !ok || len(types) == 0 {
		return
	}
	i.Refused = types
	data, err := json.Marshal(i)
	if err == nil {
		err = writeInPlace(m.intentFile(id), data, false)
	}
	if err != nil {
		m.log.Warn("that plugins refuse a pod's configuration cannot be noted", "pod", id, "error", err)
	}
}

// refused says whether ADD with this configuration was refused by a plugin of that type.
func (m *Manager) refused(id string, c *conflist) func(typ string) bool {
	return func(typ string) bool {
		i, ok := m.intended(id)
		return ok && string(i.Pod.Conflist) == string(c.Bytes) && slices.Contains(i.Refused, typ)
	}
}
