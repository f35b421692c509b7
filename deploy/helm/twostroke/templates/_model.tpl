{{/* Where the model lies: model.uri as a volume, a directory for --model, and a download. */}}

{{/* JSON: {kind: bundled|hf|pvc|pvc+hf|host, source, path, repo, directory, name} */}}
{{- define "twostroke.model" -}}
{{- $model := .Values.model -}}
{{- $kind := regexReplaceAll "://.*" $model.uri "" -}}
{{- $rest := regexReplaceAll "^[a-z+]+://" $model.uri "" -}}
{{- $revision := default "main" $model.revision -}}
{{- $parts := splitn "/" 2 $rest -}}
{{- $facts := dict "kind" $kind "repo" "" "source" "" "directory" "" -}}
{{- if eq $kind "hf" -}}
{{- $facts = merge (dict "repo" $rest "directory" (printf "%s/%s/%s" $model.mountPath $rest $revision) "name" $rest) $facts -}}
{{- else if eq $kind "pvc+hf" -}}
{{- $facts = merge (dict "source" $parts._0 "repo" $parts._1 "directory" (printf "%s/%s/%s" $model.mountPath $parts._1 $revision) "name" $parts._1) $facts -}}
{{- else if eq $kind "pvc" -}}
{{- $path := trimSuffix "/" (default "" $parts._1) -}}
{{- $facts = merge (dict "source" $parts._0 "directory" (printf "%s/%s" $model.mountPath $path | trimSuffix "/") "name" (base $path)) $facts -}}
{{- else if eq $kind "host" -}}
{{- $facts = merge (dict "source" $rest "directory" $model.mountPath "name" (base $rest)) $facts -}}
{{- else -}}
{{- $facts = merge (dict "name" "twostroke-bundled") $facts -}}
{{- end -}}
{{- if $model.name }}{{ $_ := set $facts "name" $model.name }}{{ end -}}
{{- $facts | toJson -}}
{{- end }}

{{- define "twostroke.modelVolume" -}}
{{- $model := include "twostroke.model" . | fromJson -}}
{{- if eq $model.kind "hf" }}
- name: model
  emptyDir:
    sizeLimit: {{ .Values.model.size }}
{{- else if has $model.kind (list "pvc" "pvc+hf") }}
- name: model
  persistentVolumeClaim:
    claimName: {{ $model.source }}
    readOnly: {{ eq $model.kind "pvc" }}
{{- else if eq $model.kind "host" }}
- name: model
  hostPath:
    path: {{ $model.source }}
    type: Directory
{{- end }}
{{- end }}

{{- define "twostroke.modelMount" -}}
{{- if ne (include "twostroke.model" . | fromJson).kind "bundled" }}
- name: model
  mountPath: {{ .Values.model.mountPath }}
  readOnly: true
{{- end }}
{{- end }}

{{/* Download before the process starts. A router wants the tokenizer only. Give dict "root" $ "patterns" LIST. */}}
{{- define "twostroke.modelDownload" -}}
{{- $root := .root -}}
{{- $model := include "twostroke.model" $root | fromJson -}}
{{- if $model.repo }}
- name: download
  image: {{ include "twostroke.image" $root }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  args:
    - hf
    - download
    - {{ $model.repo }}
    - --revision={{ default "main" $root.Values.model.revision }}
    - --local-dir={{ $model.directory }}
    {{- range .patterns }}
    - --include={{ . }}
    {{- end }}
  env:
    - {name: HF_HOME, value: /tmp/hf}
    {{- with $root.Values.model.authSecretName }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef: {name: {{ . }}, key: {{ $root.Values.model.authSecretKey }}}
    {{- end }}
  securityContext:
    {{- include "twostroke.containerSecurity" (dict "root" $root "capabilities" list) | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: model, mountPath: {{ $root.Values.model.mountPath }}}
{{- end }}
{{- end }}
